"""Image slots grouped by size, for adapters take images of one size at a time."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megafusion.images.sizes import Size, bounding_size
from megafusion.model.config import Grid

Skips = tuple[Tensor, ...]


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


def patches_by_size(
    encode: Callable[[Tensor, Tensor], tuple[Tensor, Skips]],
    sizes: Sequence[Size],
    max_patches: int,
    latents_NCHW: Tensor,
    timesteps_N: Tensor,
    sizes_N: Tensor,
) -> tuple[Tensor, Skips]:
    """Patches and skips that `encode` makes of images of several sizes, each at the top left of its latents.

    Patches [N, max_patches, D], and each skip [N, numbers]: an image's own come first, then zeros, so that
    the shapes are the same whatever sizes a batch holds.
    """
    groups = Groups(sizes_N, len(sizes))
    made, kept = [], []
    for (height, width), latents, timesteps in zip(
        sizes, groups.take(latents_NCHW), groups.take(timesteps_N), strict=True
    ):
        patches, skips = encode(latents[..., :height, :width], timesteps)
        made.append(F.pad(patches, (0, 0, 0, max_patches - patches.shape[1])))
        kept.append([skip.flatten(1) for skip in skips])
    return groups.put(made), tuple(map(groups.put, map(_filled_up, zip(*kept, strict=True))))


def predict_by_size(
    decode: Callable[[Tensor, Tensor, Skips, Grid], Tensor],
    image_skip_shapes: Callable[[Grid], Sequence[tuple[int, int, int]]],
    sizes: Sequence[Size],
    grids: Sequence[Grid],
    hidden_NPD: Tensor,
    timesteps_N: Tensor,
    skips: Skips,
    sizes_N: Tensor,
) -> Tensor:
    """Predictions [N, C, H, W] from patches and skips as `patches_by_size` gives them; zeros elsewhere."""
    groups = Groups(sizes_N, len(sizes))
    hidden, timesteps = groups.take(hidden_NPD), groups.take(timesteps_N)
    kept = [groups.take(skip) for skip in skips]
    height, width = bounding_size(sizes)
    predictions = []
    for number, grid in enumerate(grids):
        shaped = tuple(
            skip[number][:, : math.prod(shape)].unflatten(1, shape)
            for skip, shape in zip(kept, image_skip_shapes(grid), strict=True)
        )
        own = decode(hidden[number][:, : math.prod(grid)], timesteps[number], shaped, grid)
        predictions.append(F.pad(own, (0, width - own.shape[-1], 0, height - own.shape[-2])))
    return groups.put(predictions)


def _filled_up(parts: Sequence[Tensor]) -> list[Tensor]:
    """Parts [n, numbers] with as many numbers as the longest has."""
    longest = max(part.shape[1] for part in parts)
    return [F.pad(part, (0, longest - part.shape[1])) for part in parts]
