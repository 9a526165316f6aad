"""Image slots grouped by size, because adapters take images of one size at a time."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


class SizeGroups:
    """The slots of each size, in order.

    Every size has at least one slot, so that all ranks run the same modules and every parameter has a
    gradient, whatever the batch: if no image has a size, another slot is computed, and `merge` drops it.
    """

    def __init__(self, sizes_N: Tensor, num_sizes: int):
        self._order = sizes_N.argsort(stable=True)
        sizes = torch.arange(num_sizes, device=sizes_N.device)
        self._counts = (sizes_N == sizes[:, None]).sum(1).tolist()  # one synchronization with the device

    def split(self, x: Tensor) -> list[Tensor]:
        """For each size, its slots of [N, ...]."""
        return [x[slots if len(slots) else self._order[:1]] for slots in self._order.split(self._counts)]

    def merge(self, groups: Sequence[Tensor]) -> Tensor:
        """[N, L, ...] from a tensor [n, l, ...] for each size, zero-padded to the largest l."""
        longest = max(group.shape[1] for group in groups)
        padded = [F.pad(x, (0, 0) * (x.ndim - 2) + (0, longest - x.shape[1])) for x in groups]
        counted = [x[:count] for x, count in zip(padded, self._counts, strict=True)]
        return torch.cat(counted)[self._order.argsort()]
