"""Latents to patch vectors of the transformer's width, and back.

An adapter is a pair: `down` stands in the stem, `up` in the tail, and what `down` remembers of its
input (its skips) travels beside the sequence from one to the other.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megafusion.model.config import Grid

Skips = tuple[Tensor, ...]


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


class LinearDown(nn.Module):
    """The timestep's embedding is added to each patch vector, then one linear layer widens it."""

    def __init__(self, channels: int, patch_size: int, width: int):
        super().__init__()
        self.patch_size = patch_size
        patch_width = channels * patch_size**2
        self.timestep = TimestepEmbedding(patch_width)
        self.linear = nn.Linear(patch_width, width)

    def forward(self, latents_NCHW: Tensor, timesteps_N: Tensor) -> tuple[Tensor, Skips]:
        """[N, C, H, W] noised latents -> [N, P, D] patches in raster order, and no skips."""
        patches_NPC = F.pixel_unshuffle(latents_NCHW, self.patch_size).flatten(2).transpose(1, 2)
        return self.linear(patches_NPC + self.timestep(timesteps_N)[:, None]), ()


class LinearUp(nn.Module):
    """One linear layer from the transformer's output to each patch's latents."""

    def __init__(self, channels: int, patch_size: int, width: int, grid: Grid):
        super().__init__()
        self.patch_size, self.grid = patch_size, grid
        self.linear = nn.Linear(width, channels * patch_size**2)

    def forward(
        self, hidden_NPD: Tensor, timesteps_N: Tensor, skips: Skips, grid: Grid | None = None
    ) -> Tensor:
        """[N, P, D] -> [N, C, H, W]; timestep and skips are for the adapters that use them.

        grid: of these images, where it is another than the adapter was made with.
        """
        patches_NCP = self.linear(hidden_NPD).transpose(1, 2)
        return F.pixel_shuffle(patches_NCP.unflatten(2, grid or self.grid), self.patch_size)

    def skip_shapes(self, grid: Grid) -> list[tuple[int, int, int]]:
        """Channels, height and width of each skip that `forward` reads of an image: none."""
        return []
