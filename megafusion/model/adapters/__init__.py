"""Adapters between latents and the transformer: `Down` in the stem, `Up` in the tail.

To add an adapter, write a module here with these two classes, each made from a ModelConfig, and add its name
to `AdapterName` in model/config.py. Skips are features that `Down` hands to `Up` beside the residual stream.
"""

import math
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megafusion.images.sizes import bounding_size
from megafusion.model.config import AdapterName, Grid, ModelConfig

Skips = tuple[Tensor, ...]


def adapter_module(name: AdapterName) -> ModuleType:
    """The module of an adapter, imported on first use because diffusers imports slowly."""
    return import_module(f"{__name__}.{name}")


class SizeGroups:
    """Image slots grouped by size, because adapters take images of one size at a time.

    Every size has at least one slot, so that all ranks run the same modules and every parameter has a
    gradient, whatever the batch: if no image has a size, another slot is computed, and `merge` drops it.
    sizes_N: on the host, or the host waits for its device. device: of the slots.
    """

    def __init__(self, sizes_N: Tensor, num_sizes: int, device: torch.device):
        on_host = sizes_N.cpu()
        order = on_host.argsort(stable=True)
        self._counts = on_host.bincount(minlength=num_sizes).tolist()
        self._order, self._inverse = (x.to(device, non_blocking=True) for x in (order, order.argsort()))

    def split(self, x: Tensor) -> list[Tensor]:
        """For each size, its slots of [N, ...]."""
        return [x[slots if len(slots) else self._order[:1]] for slots in self._order.split(self._counts)]

    def merge(self, groups: Sequence[Tensor]) -> Tensor:
        """[N, L, ...] from a tensor [n, l, ...] for each size, zero-padded to the largest l."""
        longest = max(group.shape[1] for group in groups)
        kept = (x[:count] for x, count in zip(groups, self._counts, strict=True))
        padded = [F.pad(x, (0, 0) * (x.ndim - 2) + (0, longest - x.shape[1])) for x in kept]
        return torch.cat(padded)[self._inverse]


class DownAdapter(nn.Module):
    """Latents to patch vectors. A subclass implements `encode` for images of one size."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.sizes, self.patch_size = config.latent_sizes, config.patch_size

    def encode(self, latents_NCHW: Tensor, timesteps_N: Tensor) -> tuple[Tensor, Skips]:
        """[N, C, H, W] noised latents -> [N, P, D] patches in raster order, and skips [N, ...]."""
        raise NotImplementedError

    def forward(self, latents_NCHW: Tensor, timesteps_N: Tensor, sizes_N: Tensor) -> tuple[Tensor, Skips]:
        """Patches [N, P, D] of noised latents, and skips; sizes_N: index of each image's size, on the host.

        With several sizes, each image is at the top left of its latents. Its patches, and its flattened
        skips, are zero-padded to those of the largest size, so that shapes do not depend on the batch.
        """
        if len(self.sizes) == 1:
            return self.encode(latents_NCHW, timesteps_N)
        groups = SizeGroups(sizes_N, len(self.sizes), latents_NCHW.device)
        inputs = zip(self.sizes, groups.split(latents_NCHW), groups.split(timesteps_N), strict=True)
        encoded = [self.encode(latents[..., :height, :width], t) for (height, width), latents, t in inputs]
        patches, skips = zip(*encoded, strict=True)
        by_skip = ([skip.flatten(1) for skip in group] for group in zip(*skips, strict=True))
        return groups.merge(patches), tuple(map(groups.merge, by_skip))


class UpAdapter(nn.Module):
    """Hidden states to predictions. A subclass implements `decode` and `image_skip_shapes`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.grids, self.patch_size = config.grids, config.patch_size
        self.bounding_size = bounding_size(config.latent_sizes)

    def decode(self, hidden_NPD: Tensor, timesteps_N: Tensor, skips: Skips, grid: Grid) -> Tensor:
        """[N, P, D] hidden states at patches -> [N, C, H, W] predictions for images of one size."""
        raise NotImplementedError

    def image_skip_shapes(self, grid: Grid) -> list[tuple[int, int, int]]:
        """Channels, height and width of each skip of an image."""
        return []

    def forward(self, hidden_NPD: Tensor, timesteps_N: Tensor, skips: Skips, sizes_N: Tensor) -> Tensor:
        """Predictions [N, C, H, W]; several sizes as in DownAdapter, zero-padded."""
        if len(self.grids) == 1:
            return self.decode(hidden_NPD, timesteps_N, skips, self.grids[0])
        groups = SizeGroups(sizes_N, len(self.grids), hidden_NPD.device)
        height, width = self.bounding_size
        predictions = []
        inputs = zip(self.grids, *map(groups.split, (hidden_NPD, timesteps_N, *skips)), strict=True)
        for grid, hidden, timesteps, *flat in inputs:
            shapes = zip(flat, self.image_skip_shapes(grid), strict=True)
            group_skips = tuple(skip[:, : math.prod(shape)].unflatten(1, shape) for skip, shape in shapes)
            images = self.decode(hidden[:, : math.prod(grid)], timesteps, group_skips, grid)
            predictions.append(F.pad(images, (0, width - images.shape[-1], 0, height - images.shape[-2])))
        return groups.merge(predictions)

    def skip_shapes(self, num_images: int) -> tuple[torch.Size, ...]:
        """Shapes of the skips of a number of images."""
        by_size = [self.image_skip_shapes(grid) for grid in self.grids]
        if len(by_size) == 1:
            return tuple(torch.Size((num_images, *shape)) for shape in by_size[0])
        longest = (max(map(math.prod, shapes)) for shapes in zip(*by_size, strict=True))
        return tuple(torch.Size((num_images, length)) for length in longest)


class TimestepEmbedding(nn.Module):
    """Sines and cosines of the timestep through a two-layer perceptron, as in DDPM (arXiv 2006.11239)."""

    def __init__(self, size: int, num_frequencies: int = 128):
        super().__init__()
        self.num_frequencies = num_frequencies
        self.layers = nn.Sequential(nn.Linear(2 * num_frequencies, size), nn.SiLU(), nn.Linear(size, size))

    def forward(self, timesteps_N: Tensor) -> Tensor:
        """[N] timesteps -> [N, size]."""
        exponent = torch.arange(self.num_frequencies, device=timesteps_N.device) / self.num_frequencies
        angles = timesteps_N[:, None].float() * torch.exp(-math.log(10_000) * exponent)
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.layers(waves.to(self.layers[0].weight.dtype))
