"""Image slots grouped by size, for adapters take images of one size at a time."""

from collections.abc import Sequence

import torch
from torch import Tensor


class Groups:
    """The slots of each size in order.

    Every size has one slot at least, so that all ranks run all modules, and every parameter has a gradient,
    whatever a batch holds: where no image has that size, some other slot stands in, and `put` drops it.
    """

    def __init__(self, sizes_N: Tensor, num_sizes: int):
        order = sizes_N.argsort(stable=True)
        own = torch.arange(num_sizes, device=sizes_N.device)
        counts = (sizes_N == own[:, None]).sum(1).tolist()  # waits for the device, once
        self._slots: list[Tensor] = []
        self._place = torch.empty_like(order)
        first = 0
        for slots in order.split(counts):
            self._place[slots] = torch.arange(first, first + len(slots), device=order.device)
            self._slots.append(slots if len(slots) else order[:1])
            first += len(self._slots[-1])

    def take(self, x: Tensor) -> list[Tensor]:
        """By size: its slots of [N, ...]."""
        return [x[slots] for slots in self._slots]

    def put(self, parts: Sequence[Tensor]) -> Tensor:
        """[N, ...], from what was made of each size."""
        return torch.cat(list(parts))[self._place]
