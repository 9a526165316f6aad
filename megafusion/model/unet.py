"""The U-Net adapter: convolutions down to the patches before the transformer, and up again after it.

The paper's variant: residual blocks conditioned on the timestep, one halving of the resolution for
each factor 2 of the patch size, layer norm in place of adaptive layer norm, and the up path reads the
transformer's output together with the features that the down path kept.
"""

from collections.abc import Sequence

import torch
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from megafusion.images.sizes import Size
from megafusion.model.adapters import DownAdapter, TimestepEmbedding, UpAdapter
from megafusion.model.by_size import Skips
from megafusion.model.config import Grid


def _level_channels(channels: int, patch_size: int) -> list[int]:
    """Channels from full resolution to the patches: they double once, then stay."""
    num_halvings = patch_size.bit_length() - 1
    return [channels] + [2 * channels] * num_halvings


def _residual(in_channels: int, out_channels: int, timestep_width: int) -> ResnetBlock2D:
    # One group: the norm is a layer norm over channels and positions.
    return ResnetBlock2D(
        in_channels=in_channels, out_channels=out_channels, temb_channels=timestep_width, groups=1
    )


class UNetDown(DownAdapter):
    """Latents to patches: two residual blocks a level, then a linear layer to the width."""

    def __init__(self, in_channels: int, patch_size: int, width: int, channels: int, sizes: Sequence[Size]):
        super().__init__(patch_size, sizes)
        levels = _level_channels(channels, patch_size)
        timestep_width = 4 * channels
        self.timestep = TimestepEmbedding(timestep_width)
        self.conv_in = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.blocks, self.halvings = nn.ModuleList(), nn.ModuleList()
        previous = channels
        for level, size in enumerate(levels):
            self.halvings.append(Downsample2D(previous, use_conv=True, name="op") if level else nn.Identity())
            self.blocks.append(_residual(previous, size, timestep_width))
            self.blocks.append(_residual(size, size, timestep_width))
            previous = size
        self.linear = nn.Linear(previous, width)

    def encode(self, latents_NCHW: Tensor, timesteps_N: Tensor) -> tuple[Tensor, Skips]:
        """[N, C, H, W] noised latents -> [N, P, D] patches in raster order, and each block's features."""
        embedding = self.timestep(timesteps_N)
        x = self.conv_in(latents_NCHW)
        skips = []
        for level, halve in enumerate(self.halvings):
            x = halve(x)
            for block in self.blocks[2 * level : 2 * level + 2]:
                x = block(x, embedding)
                skips.append(x)
        return self.linear(x.flatten(2).transpose(1, 2)), tuple(skips)


class UNetUp(UpAdapter):
    """Patches to latents: the mirror of UNetDown, each block reading the features kept at its place."""

    def __init__(self, out_channels: int, patch_size: int, width: int, channels: int, sizes: Sequence[Size]):
        super().__init__(patch_size, sizes)
        levels = _level_channels(channels, patch_size)[::-1]
        timestep_width = 4 * channels
        self.levels = levels
        self.timestep = TimestepEmbedding(timestep_width)
        self.linear = nn.Linear(width, levels[0])
        self.blocks, self.doublings = nn.ModuleList(), nn.ModuleList()
        previous = levels[0]
        for level, size in enumerate(levels):
            self.doublings.append(Upsample2D(previous, use_conv=True) if level else nn.Identity())
            self.blocks.append(_residual(previous + size, size, timestep_width))
            self.blocks.append(_residual(2 * size, size, timestep_width))
            previous = size
        self.norm_out = nn.GroupNorm(1, channels)
        self.conv_out = nn.Conv2d(channels, out_channels, 3, padding=1)

    def decode(self, hidden_NPD: Tensor, timesteps_N: Tensor, skips: Skips, grid: Grid) -> Tensor:
        """[N, P, D] with the down path's features -> [N, C, H, W]."""
        embedding = self.timestep(timesteps_N)
        kept = list(skips)
        x = self.linear(hidden_NPD).transpose(1, 2).unflatten(2, grid)
        for level, double in enumerate(self.doublings):
            x = double(x)
            for block in self.blocks[2 * level : 2 * level + 2]:
                x = block(torch.cat([x, kept.pop()], dim=1), embedding)
        return self.conv_out(nn.functional.silu(self.norm_out(x)))

    def image_skip_shapes(self, grid: Grid) -> list[tuple[int, int, int]]:
        """Channels, height and width of each skip that `decode` reads of an image, in UNetDown's order."""
        coarse_to_fine = [
            (size, grid[0] << doubling, grid[1] << doubling) for doubling, size in enumerate(self.levels)
        ]
        return [shape for shape in reversed(coarse_to_fine) for _ in range(2)]
