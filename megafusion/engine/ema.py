"""An exponential moving average of the weights, from which images are drawn."""

import torch
from torch import Tensor

from megafusion.engine.optimizer_state import OptimizerShard


class Ema:
    """The averages of this rank's master weights. The decay at a step is at most (1 + step) / (10 + step)."""

    def __init__(self, optimizer_shards: list[OptimizerShard], decay: float):
        self.decay = decay
        self._weights = [shard.weight for shard in optimizer_shards]
        self.fragments: list[Tensor] = [weight.clone() for weight in self._weights]
        """float32, one for each optimizer shard, in the same order."""

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the averages towards the weights after `step` updates."""
        decay = min(self.decay, (1 + step) / (10 + step))
        if self.fragments:  # a rank may own none
            torch._foreach_lerp_(self.fragments, self._weights, 1 - decay)
