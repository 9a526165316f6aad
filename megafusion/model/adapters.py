"""Latents to patch vectors of the transformer's width, and back.

An adapter is a pair: `down` stands in the stem, `up` in the tail, and what `down` remembers of its
input (its skips) travels beside the sequence from one to the other.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megafusion.images.sizes import Size
from megafusion.model.by_size import Skips, patches_by_size, predict_by_size
from megafusion.model.config import Grid


class DownAdapter(nn.Module):
    """Latents to patch vectors, in the stem. A kind of adapter defines `encode` for images of one size.

    sizes: heights and widths of the model's latents.
    """

    def __init__(self, patch_size: int, sizes: Sequence[Size]):
        super().__init__()
        self.patch_size, self.sizes = patch_size, sizes
        self.max_patches = max(map(math.prod, sizes)) // patch_size**2

    def forward(
        self, latents_NCHW: Tensor, timesteps_N: Tensor, sizes_N: Tensor | None = None
    ) -> tuple[Tensor, Skips]:
        """Patches [N, P, D] of noised latents, and the skips; sizes_N: index of each image's size.

        Of several sizes, each image is at the top left of its latents; its patches, and its features in
        each skip, flattened, are padded with zeros to those of the largest: one shape for all.
        """
        if len(self.sizes) == 1:
            return self.encode(latents_NCHW, timesteps_N)
        return patches_by_size(self.encode, self.sizes, self.max_patches, latents_NCHW, timesteps_N, sizes_N)


class UpAdapter(nn.Module):
    """Patch vectors to latents, in the tail. A kind of adapter defines `decode` and `image_skip_shapes`."""

    def __init__(self, patch_size: int, sizes: Sequence[Size]):
        super().__init__()
        self.patch_size, self.sizes = patch_size, sizes
        self.grids: list[Grid] = [(height // patch_size, width // patch_size) for height, width in sizes]

    def forward(
        self, hidden_NPD: Tensor, timesteps_N: Tensor, skips: Skips, sizes_N: Tensor | None = None
    ) -> Tensor:
        """Predictions [N, C, H, W]; skips and several sizes as DownAdapter gives them."""
        if len(self.sizes) == 1:
            return self.decode(hidden_NPD, timesteps_N, skips, self.grids[0])
        return predict_by_size(
            self.decode,
            self.image_skip_shapes,
            self.sizes,
            self.grids,
            hidden_NPD,
            timesteps_N,
            skips,
            sizes_N,
        )

    def skip_shapes(self, num_images: int) -> tuple[torch.Size, ...]:
        """Shapes of the skips of some images."""
        by_size = [self.image_skip_shapes(grid) for grid in self.grids]
        if len(by_size) == 1:
            return tuple(torch.Size((num_images, *shape)) for shape in by_size[0])
        return tuple(
            torch.Size((num_images, max(map(math.prod, shapes)))) for shapes in zip(*by_size, strict=True)
        )


class TimestepEmbedding(nn.Module):
    """Sines and cosines of the timestep through a two-layer perceptron, as in DDPM (arXiv 2006.11239)."""

    num_frequencies = 128

    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2 * self.num_frequencies, width), nn.SiLU(), nn.Linear(width, width)
        )

    def forward(self, timesteps_N: Tensor) -> Tensor:
        """[N] timesteps -> [N, width]."""
        exponent = torch.arange(self.num_frequencies, device=timesteps_N.device) / self.num_frequencies
        angles = timesteps_N[:, None].float() * torch.exp(-math.log(10_000) * exponent)
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.layers(waves.to(self.layers[0].weight.dtype))


class LinearDown(DownAdapter):
    """The timestep's embedding is added to each patch vector, then one linear layer widens it."""

    def __init__(self, channels: int, patch_size: int, width: int, sizes: Sequence[Size]):
        super().__init__(patch_size, sizes)
        patch_width = channels * patch_size**2
        self.timestep = TimestepEmbedding(patch_width)
        self.linear = nn.Linear(patch_width, width)

    def encode(self, latents_NCHW: Tensor, timesteps_N: Tensor) -> tuple[Tensor, Skips]:
        """[N, C, H, W] noised latents -> [N, P, D] patches in raster order, and no skips."""
        patches_NPC = F.pixel_unshuffle(latents_NCHW, self.patch_size).flatten(2).transpose(1, 2)
        return self.linear(patches_NPC + self.timestep(timesteps_N)[:, None]), ()


class LinearUp(UpAdapter):
    """One linear layer from the transformer's output to each patch's latents."""

    def __init__(self, channels: int, patch_size: int, width: int, sizes: Sequence[Size]):
        super().__init__(patch_size, sizes)
        self.linear = nn.Linear(width, channels * patch_size**2)

    def decode(self, hidden_NPD: Tensor, timesteps_N: Tensor, skips: Skips, grid: Grid) -> Tensor:
        """[N, P, D] -> [N, C, H, W]; timestep and skips are for the adapters that use them."""
        patches_NCP = self.linear(hidden_NPD).transpose(1, 2)
        return F.pixel_shuffle(patches_NCP.unflatten(2, grid), self.patch_size)

    def image_skip_shapes(self, grid: Grid) -> list[tuple[int, int, int]]:
        """Channels, height and width of each skip that `decode` reads of an image: none."""
        return []
