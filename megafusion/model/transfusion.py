"""The whole model: stem, blocks, tail - the three kinds of pipeline stage, called in turn on one device."""

import math
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from megafusion.config import Config
from megafusion.model.adapters import Grid, LinearDown, LinearUp, Skips
from megafusion.model.attention import Backend, check_backend
from megafusion.model.by_size import patches_by_size, predict_by_size
from megafusion.model.rope import Rope, rope_at
from megafusion.model.transformer import Block
from megafusion.model.unet import UNetDown, UNetUp
from megafusion.objective.losses import Losses, Objective, ObjectiveConfig
from megafusion.sequence.packing import PackedBatch
from megafusion.sequence.sizes import Size, say_sizes

Positive = Annotated[int, Field(gt=0)]


class ModelConfig(Config):
    """A size of the model, named as the paper's table names it."""

    num_layers: int = Field(gt=0)
    """Transformer blocks."""
    width: int = Field(gt=0)
    """Size D of the residual stream."""
    num_heads: int = Field(gt=0)
    """Query heads."""
    num_kv_heads: int | None = Field(None, gt=0)
    """Key and value heads, fewer for grouped-query attention; as many as num_heads by default."""
    hidden_width: int | None = Field(None, gt=0)
    """Size of the feed-forward's hidden layer; 8/3 of the width rounded up to 128 by default."""
    vocab_size: int = Field(gt=0)
    """Text pieces plus boi and eoi, the tokenizer's vocab_size; and one more for each of more_sizes."""
    latent_shape: tuple[Positive, Positive, Positive]
    """Channels, height and width of an image's latents."""
    more_sizes: tuple[tuple[Positive, Positive], ...] = ()
    """Further heights and widths that an image's latents may have; each begins with a token of its own."""
    patch_size: Literal[1, 2, 4, 8]
    """Side of a patch in latents; an image takes (height / patch_size) x (width / patch_size) positions."""
    adapter: Literal["linear", "unet"] = "linear"
    """What stands between latents and the transformer."""
    unet_channels: int = Field(320, gt=0)
    """Channels of the U-Net adapter at full resolution; twice as many below it."""
    attention: Backend = "sdpa"
    """Attention backend: sdpa anywhere; interval, the Triton kernels on CUDA; flash, flash-attention 4 on
    CUDA (or 2, for text alone); flex, PyTorch's FlexAttention; auto, the fastest measured that serves."""
    rope_theta: float = Field(10_000.0, gt=0)
    """Base of the rotary frequencies."""
    norm_epsilon: float = Field(1e-5, gt=0)
    """Added to the mean square in RMSNorm."""

    @model_validator(mode="after")
    def _consistent(self) -> "ModelConfig":
        if self.width % self.num_heads or self.width // self.num_heads % 2:
            raise ValueError(
                f"width {self.width} over num_heads {self.num_heads} must be a whole, even head size"
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.kv_heads}")
        for size in self.sizes:
            if any(side % self.patch_size for side in size):
                raise ValueError(f"patch_size {self.patch_size} does not divide the latents' sides {size}")
        if len(set(self.sizes)) < len(self.sizes):
            raise ValueError(
                f"more_sizes: of {say_sizes(self.sizes)}, the first of which is latent_shape's, one comes "
                "twice; name each once"
            )
        return self

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def hidden(self) -> int:
        return self.hidden_width or -(-8 * self.width // 3 // 128) * 128

    @property
    def sizes(self) -> tuple[Size, ...]:
        """Every height and width of latents; an image names its own by the index in this list."""
        return (self.latent_shape[1:], *self.more_sizes)

    @property
    def grids(self) -> tuple[Grid, ...]:
        """Patches down and across an image, a size."""
        return tuple((height // self.patch_size, width // self.patch_size) for height, width in self.sizes)

    @property
    def num_patches(self) -> int:
        """Patches of an image of the first size."""
        return math.prod(self.grids[0])

    @property
    def most_patches(self) -> int:
        """Patches of an image of the largest size."""
        return max(map(math.prod, self.grids))


class Stem(nn.Module):
    """Tokens and noised latents to the sequence of vectors that the blocks read."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        channels = config.latent_shape[0]
        self.sizes, self.num_patches = config.sizes, config.most_patches
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        if config.adapter == "linear":
            self.adapter = LinearDown(channels, config.patch_size, config.width)
        else:
            self.adapter = UNetDown(channels, config.patch_size, config.width, config.unet_channels)

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
        channels = config.latent_shape[0]
        self.sizes, self.grids, self.num_patches = config.sizes, config.grids, config.most_patches
        self.norm = nn.RMSNorm(config.width, eps=config.norm_epsilon)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        if config.adapter == "linear":
            self.adapter = LinearUp(channels, config.patch_size, config.width, config.grids[0])
        else:
            self.adapter = UNetUp(
                channels, config.patch_size, config.width, config.unet_channels, config.grids[0]
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
        check_backend(config.attention, config.width // config.num_heads)
        self.config, self.objective = config, Objective(objective, config.sizes)
        self.stem = Stem(config)
        self.blocks = nn.ModuleList(
            Block(
                config.width,
                config.num_heads,
                config.kv_heads,
                config.hidden,
                config.attention,
                config.norm_epsilon,
            )
            for _ in range(config.num_layers)
        )
        self.tail = Tail(config)

    def rope(self, positions_BS: Tensor) -> Rope:
        """The rotation of a batch's positions, for all layers."""
        return rope_at(positions_BS, self.config.width // self.config.num_heads, self.config.rope_theta)

    def forward(self, batch: PackedBatch) -> Losses:
        """Both losses of a packed batch, each a share of its mean over the global batch."""
        inputs = batch.inputs()
        noised = self.objective.schedule.add_noise(inputs.latents, inputs.noise, inputs.timesteps)
        x_BSD, skips = self.stem(
            inputs.tokens, inputs.patch_index, noised, inputs.timesteps, inputs.image_size
        )
        intervals, rope = batch.intervals(), self.rope(inputs.positions)
        for block in self.blocks:
            x_BSD = block(x_BSD, intervals, rope)
        hidden_BSD = self.tail(x_BSD)
        images = self.tail.images(hidden_BSD, inputs.image_start, inputs.timesteps, skips, inputs.image_size)
        return self.objective(self.tail.head(hidden_BSD), images, batch.targets())
