"""The linear adapter: one linear layer from each patch of latents, and one back."""

import torch.nn.functional as F
from torch import Tensor, nn

from megafusion.model.adapters import DownAdapter, Skips, TimestepEmbedding, UpAdapter
from megafusion.model.config import Grid, ModelConfig


class Down(DownAdapter):
    """Adds the timestep's embedding to each patch, then applies a linear layer. No skips."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        patch_dim = config.latent_channels * config.patch_size**2
        self.timestep = TimestepEmbedding(patch_dim)
        self.linear = nn.Linear(patch_dim, config.hidden_size)

    def encode(self, latents_NCHW: Tensor, timesteps_N: Tensor) -> tuple[Tensor, Skips]:
        patches_NPC = F.pixel_unshuffle(latents_NCHW, self.patch_size).flatten(2).transpose(1, 2)
        return self.linear(patches_NPC + self.timestep(timesteps_N)[:, None]), ()


class Up(UpAdapter):
    """A linear layer from hidden states to each patch of latents."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.linear = nn.Linear(config.hidden_size, config.latent_channels * config.patch_size**2)

    def decode(self, hidden_NPD: Tensor, timesteps_N: Tensor, skips: Skips, grid: Grid) -> Tensor:
        patches_NCP = self.linear(hidden_NPD).transpose(1, 2)
        return F.pixel_shuffle(patches_NCP.unflatten(2, grid), self.patch_size)
