"""An exponential moving average of the weights, from which pictures are drawn."""

import torch
from torch import Tensor, nn


class Ema:
    """float32 copies of the parameters, by name; decay rises with the step as (1 + step) / (10 + step)."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.weights: dict[str, Tensor] = {
            name: p.detach().float().clone() for name, p in model.named_parameters()
        }

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move towards the weights as they are after `step` updates."""
        decay = min(self.decay, (1 + step) / (10 + step))
        current = [p.detach().float() for p in model.parameters()]
        torch._foreach_lerp_(list(self.weights.values()), current, 1 - decay)
