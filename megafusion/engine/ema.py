"""An exponential moving average of the weights, from which images are drawn."""

from typing import NamedTuple

from torch import Tensor

from megafusion.engine.optimizer_state import OptimizerShard


class Ema:
    """The averages of this rank's master weights. The decay at a step is at most (1 + step) / (10 + step)."""

    def __init__(self, optimizer_shards: list[OptimizerShard], decay: float):
        self.decay = decay
        self.weights = [shard.weight for shard in optimizer_shards]
        self._storages: dict[int, Tensor] = {}
        for shard in optimizer_shards:
            if id(shard.storage) not in self._storages:
                self._storages[id(shard.storage)] = shard.storage.detach().clone().view(-1)
        self.fragments: list[Tensor] = [
            self._storages[id(shard.storage)].narrow(0, shard.offset, shard.weight.numel())
            for shard in optimizer_shards
        ]
        """float32, one for each optimizer shard, in the same order."""

    def storage(self, of: Tensor) -> Tensor | None:
        """The averages of one of the optimizer's storages, of its size; None if no shard is in it."""
        return self._storages.get(id(of))

    def after(self, step: int) -> "EmaUpdate":
        """The update of the averages that belongs to update number `step` of the weights."""
        return EmaUpdate(self, 1 - min(self.decay, (1 + step) / (10 + step)))


class EmaUpdate(NamedTuple):
    """Averages, and how far they move towards the weights: 1 - decay."""

    ema: Ema
    weight: float
