"""The whole model: stem, blocks, tail - the three kinds of pipeline stage, called in turn on one device."""

import math

import torch
from torch import Tensor, nn

from megafusion.model.adapters import LinearDown, LinearUp, Skips
from megafusion.model.attention import check_backend
from megafusion.model.by_size import patches_by_size, predict_by_size
from megafusion.model.config import ModelConfig
from megafusion.model.transformer import Block, block_context
from megafusion.model.unet import UNetDown, UNetUp
from megafusion.objective.config import ObjectiveConfig
from megafusion.objective.losses import Losses, Objective
from megafusion.sequence.packing import PackedBatch


class Stem(nn.Module):
    """Tokens and noised latents to the sequence of vectors that the blocks read."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        channels = config.latent_channels
        self.sizes, self.num_patches = config.latent_sizes, max(config.patches)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.adapter == "linear":
            self.adapter = LinearDown(channels, config.patch_size, config.hidden_size)
        else:
            self.adapter = UNetDown(channels, config.patch_size, config.hidden_size, config.unet_channels)

    def forward(
        self,
        tokens_BS: Tensor,
        patch_index_BS: Tensor,
        latents_BNCHW: Tensor,
        timesteps_BN: Tensor,
        image_size_BN: Tensor | None = None,
    ) -> tuple[Tensor, Skips]:
        """x [B, S, D] with each patch gathered to its position, and the adapter's skips.

        image_size_BN: index of each image's size, where the model has several.
        """
        num_rows = tokens_BS.shape[0]
        latents_NCHW = latents_BNCHW.flatten(0, 1).to(self.embedding.weight.dtype)
        sizes_N = None if image_size_BN is None else image_size_BN.flatten()
        patches_NPD, skips = self.patches(latents_NCHW, timesteps_BN.flatten(), sizes_N)
        patches_BPD = patches_NPD.unflatten(0, (num_rows, -1)).flatten(1, 2)
        index = patch_index_BS.clamp(min=0).long()[..., None].expand(-1, -1, patches_BPD.shape[-1])
        is_patch = patch_index_BS[..., None] >= 0
        return torch.where(is_patch, patches_BPD.gather(1, index), self.embedding(tokens_BS)), skips

    def patches(
        self, latents_NCHW: Tensor, timesteps_N: Tensor, sizes_N: Tensor | None
    ) -> tuple[Tensor, Skips]:
        """Patches [N, P, D] of images, and the adapter's skips.

        Of several sizes, each image stands at the top left of its latents; its patches, and its features in
        each skip, flattened, are filled up with zeros to those of the largest: one shape for all.
        """
        if len(self.sizes) == 1:
            return self.adapter(latents_NCHW, timesteps_N)
        return patches_by_size(self.adapter, self.sizes, self.num_patches, latents_NCHW, timesteps_N, sizes_N)


class Tail(nn.Module):
    """The last norm, the language head, and the adapter back to latents."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        channels = config.latent_channels
        self.sizes, self.grids, self.num_patches = config.latent_sizes, config.grids, max(config.patches)
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.adapter == "linear":
            self.adapter = LinearUp(channels, config.patch_size, config.hidden_size, config.grids[0])
        else:
            self.adapter = UNetUp(
                channels, config.patch_size, config.hidden_size, config.unet_channels, config.grids[0]
            )

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Normalised hidden states [B, S, D], which `head` and `images` read."""
        return self.norm(x_BSD)

    def images(
        self,
        hidden_BSD: Tensor,
        image_start_BN: Tensor,
        timesteps_BN: Tensor,
        skips: Skips,
        image_size_BN: Tensor | None = None,
    ) -> Tensor:
        """Predictions [B, N, C, H, W] for each slot from the hidden states at its patches.

        Of several sizes, each at the top left, zeros elsewhere; image_size_BN as the stem's.
        """
        num_rows, num_slots = image_start_BN.shape
        patch = torch.arange(self.num_patches, device=hidden_BSD.device)
        # A small image at a row's end has fewer patches behind its start than the largest.
        index = (image_start_BN.clamp(min=0).long()[..., None] + patch).clamp(max=hidden_BSD.shape[1] - 1)
        hidden_NPD = (
            hidden_BSD.gather(1, index.flatten(1)[..., None].expand(-1, -1, hidden_BSD.shape[-1]))
            .unflatten(1, (num_slots, self.num_patches))
            .flatten(0, 1)
        )
        sizes_N = None if image_size_BN is None else image_size_BN.flatten()
        predictions = self.predict(hidden_NPD, timesteps_BN.flatten(), skips, sizes_N)
        return predictions.unflatten(0, (num_rows, num_slots))

    def predict(
        self, hidden_NPD: Tensor, timesteps_N: Tensor, skips: Skips, sizes_N: Tensor | None
    ) -> Tensor:
        """Predictions [N, C, H, W] of images; several sizes as in `Stem.patches`."""
        if len(self.grids) == 1:
            return self.adapter(hidden_NPD, timesteps_N, skips)
        return predict_by_size(self.adapter, self.sizes, self.grids, hidden_NPD, timesteps_N, skips, sizes_N)

    def skip_shapes(self, num_images: int) -> tuple[torch.Size, ...]:
        """Shapes of what `Stem.patches` keeps of some images for `predict`."""
        by_size = [self.adapter.skip_shapes(grid) for grid in self.grids]
        if len(by_size) == 1:
            return tuple(torch.Size((num_images, *shape)) for shape in by_size[0])
        return tuple(
            torch.Size((num_images, max(map(math.prod, shapes)))) for shapes in zip(*by_size, strict=True)
        )


class Transfusion(nn.Module):
    """One transformer over text tokens and image patches, with both losses."""

    def __init__(self, config: ModelConfig, objective: ObjectiveConfig):
        super().__init__()
        check_backend(config.attention, config.head_dim)
        self.config, self.objective = config, Objective(objective, config.latent_sizes)
        self.stem = Stem(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.tail = Tail(config)

    def forward(self, batch: PackedBatch) -> Losses:
        """Both losses of a packed batch, each a share of its mean over the global batch."""
        inputs = batch.inputs()
        noised = self.objective.noise_process.add_noise(inputs.latents, inputs.noise, inputs.t)
        timesteps = self.objective.noise_process.timesteps(inputs.t)
        x_BSD, skips = self.stem(inputs.tokens, inputs.patch_index, noised, timesteps, inputs.image_size)
        context = block_context(self.config, batch.intervals(), inputs.positions, x_BSD.dtype)
        for block in self.blocks:
            x_BSD = block(x_BSD, context)
        hidden_BSD = self.tail(x_BSD)
        images = self.tail.images(hidden_BSD, inputs.image_start, timesteps, skips, inputs.image_size)
        return self.objective(self.tail.head(hidden_BSD), images, batch.targets())
