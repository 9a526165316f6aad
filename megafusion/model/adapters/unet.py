"""The U-Net adapter: convolutions down to patches before the transformer, and up again after it.

The paper's variant: residual blocks conditioned on the timestep, one halving of the resolution per factor 2
of the patch size, and layer norm in place of adaptive layer norm. The up path reads the down path's features.
All features are channels_last, as tensor cores compute convolutions.
"""

import torch
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.nn import functional as F

from megafusion.model.adapters import DownAdapter, Skips, TimestepEmbedding, UpAdapter
from megafusion.model.config import Grid, ModelConfig


def _level_channels(config: ModelConfig) -> list[int]:
    """Channels from full resolution to the patches: they double once, then stay."""
    num_halvings = config.patch_size.bit_length() - 1
    return [config.unet_channels] + [2 * config.unet_channels] * num_halvings


class Residual(ResnetBlock2D):
    """A residual block, whose own forward would copy channels_last features to channels first."""

    def __init__(self, config: ModelConfig, in_channels: int, out_channels: int):
        size = 4 * config.unet_channels
        super().__init__(in_channels=in_channels, out_channels=out_channels, temb_channels=size, groups=1)
        self.norm1: nn.Module = ImageNorm(in_channels, eps=1e-6)
        self.norm2: nn.Module = ImageNorm(out_channels, eps=1e-6)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:  # type: ignore[override]
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = hidden + self.time_emb_proj(F.silu(embedding))[..., None, None]
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        return hidden + (self.conv_shortcut(x) if self.conv_shortcut else x)


class ImageNorm(nn.GroupNorm):
    """Layer norm over channels and positions, with a weight and a bias a channel, of channels_last features.

    GroupNorm of one group computes the same, but on a GPU it copies its input to channels first.
    """

    def __init__(self, num_channels: int, eps: float = 1e-5):
        super().__init__(1, num_channels, eps)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        x_NHWC = F.group_norm(x_NCHW.permute(0, 2, 3, 1), 1, eps=self.eps)
        return torch.addcmul(self.bias, x_NHWC, self.weight).permute(0, 3, 1, 2)


class Down(DownAdapter):
    """Two residual blocks per level, then a linear layer to the hidden size."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        channels = config.unet_channels
        self.timestep = TimestepEmbedding(4 * config.unet_channels)
        self.conv_in = nn.Conv2d(config.latent_channels, channels, 3, padding=1)
        self.blocks, self.halvings = nn.ModuleList(), nn.ModuleList()
        for level, size in enumerate(_level_channels(config)):
            self.halvings.append(Downsample2D(channels, use_conv=True, name="op") if level else nn.Identity())
            self.blocks += [Residual(config, channels, size), Residual(config, size, size)]
            channels = size
        self.linear = nn.Linear(channels, config.hidden_size)

    def encode(self, latents_NCHW: Tensor, timesteps_N: Tensor) -> tuple[Tensor, Skips]:
        """Skips: the features after each residual block."""
        embedding = self.timestep(timesteps_N)
        x = self.conv_in(latents_NCHW.contiguous(memory_format=torch.channels_last))
        skips = []
        for halve, *blocks in zip(self.halvings, self.blocks[::2], self.blocks[1::2], strict=True):
            x = halve(x)
            for block in blocks:
                x = block(x, embedding)
                skips.append(x)
        return self.linear(x.flatten(2).transpose(1, 2)), tuple(skips)


class Up(UpAdapter):
    """The mirror of Down; each residual block also reads the skip at its position."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.levels = _level_channels(config)[::-1]
        channels = self.levels[0]
        self.timestep = TimestepEmbedding(4 * config.unet_channels)
        self.linear = nn.Linear(config.hidden_size, channels)
        self.blocks, self.doublings = nn.ModuleList(), nn.ModuleList()
        for level, size in enumerate(self.levels):
            self.doublings.append(Upsample2D(channels, use_conv=True) if level else nn.Identity())
            self.blocks += [Residual(config, channels + size, size), Residual(config, 2 * size, size)]
            channels = size
        self.norm_out = ImageNorm(channels)
        self.conv_out = nn.Conv2d(channels, config.latent_channels, 3, padding=1)

    def decode(self, hidden_NPD: Tensor, timesteps_N: Tensor, skips: Skips, grid: Grid) -> Tensor:
        embedding = self.timestep(timesteps_N)
        remaining = [skip.contiguous(memory_format=torch.channels_last) for skip in skips]
        x = self.linear(hidden_NPD).transpose(1, 2).unflatten(2, grid)
        for double, *blocks in zip(self.doublings, self.blocks[::2], self.blocks[1::2], strict=True):
            x = double(x)
            for block in blocks:
                x = block(torch.cat([x, remaining.pop()], dim=1), embedding)
        return self.conv_out(F.silu(self.norm_out(x)))

    def image_skip_shapes(self, grid: Grid) -> list[tuple[int, int, int]]:
        rows, columns = grid
        coarse_to_fine = [(size, rows << level, columns << level) for level, size in enumerate(self.levels)]
        return [shape for shape in reversed(coarse_to_fine) for _ in range(2)]
