"""An exponential moving average of the weights, from which pictures are drawn."""

import torch
from torch import Tensor

from megafusion.engine.optimizer_state import OptimizerShard


class Ema:
    """A float32 fragment for each master; decay rises with the step as (1 + step) / (10 + step)."""

    def __init__(self, optimizer_shards: list[OptimizerShard], decay: float):
        self.decay = decay
        self._weights = [master.weight for master in optimizer_shards]
        self.fragments: list[Tensor] = [weight.clone() for weight in self._weights]
        """In the order of the masters."""

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the weights as they are after `step` updates."""
        decay = min(self.decay, (1 + step) / (10 + step))
        if self.fragments:  # a rank may own nothing
            torch._foreach_lerp_(self.fragments, self._weights, 1 - decay)
