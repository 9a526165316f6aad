"""The sizes of a model."""

import math
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from megafusion.config import Config
from megafusion.images.sizes import Size, say_sizes
from megafusion.model.adapters import Grid
from megafusion.model.attention import BackendName

Positive = Annotated[int, Field(gt=0)]


class ModelConfig(Config):
    """A size of the model, named as the paper's table names it."""

    renamed_keys: ClassVar[dict[str, str]] = {
        "width": "hidden_size",
        "hidden_width": "ffn_hidden_size",
        "norm_epsilon": "norm_eps",
    }

    num_layers: int = Field(gt=0)
    """Transformer blocks."""
    hidden_size: int = Field(gt=0)
    """Size D of the residual stream."""
    num_heads: int = Field(gt=0)
    """Query heads."""
    num_kv_heads: int | None = Field(None, gt=0)
    """Key and value heads, fewer for grouped-query attention; as many as num_heads by default."""
    ffn_hidden_size: int | None = Field(None, gt=0)
    """Size of the feed-forward's hidden layer; 8/3 of hidden_size, rounded up to 128 by default."""
    vocab_size: int = Field(gt=0)
    """Text pieces plus boi and eoi, the tokenizer's vocab_size; and one more for each of more_sizes."""
    latent_shape: tuple[Positive, Positive, Positive]
    """Channels, height and hidden_size of an image's latents."""
    more_sizes: tuple[tuple[Positive, Positive], ...] = ()
    """Further heights and widths that an image's latents may have; each begins with a token of its own."""
    patch_size: Literal[1, 2, 4, 8]
    """Side of a patch in latents; an image takes (height / patch_size) x (width / patch_size) positions."""
    adapter: Literal["linear", "unet"] = "linear"
    """What stands between latents and the transformer."""
    unet_channels: int = Field(320, gt=0)
    """Channels of the U-Net adapter at full resolution; twice as many below it."""
    attention: BackendName = "sdpa"
    """Attention backend: sdpa anywhere; interval, the Triton kernels on CUDA; flash, flash-attention 4 on
    CUDA (or 2, for text alone); flex, PyTorch's FlexAttention; auto, the fastest measured that serves."""
    rope_theta: float = Field(10_000.0, gt=0)
    """Base of the rotary frequencies."""
    norm_eps: float = Field(1e-5, gt=0)
    """Added to the mean square in RMSNorm."""

    @model_validator(mode="after")
    def _consistent(self) -> "ModelConfig":
        if self.hidden_size % self.num_heads or self.hidden_size // self.num_heads % 2:
            raise ValueError(
                f"hidden_size {self.hidden_size} / num_heads {self.num_heads} must be a whole, even head_dim"
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
    def head_dim(self) -> int:
        """Size K of an attention head."""
        return self.hidden_size // self.num_heads

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def ffn_size(self) -> int:
        return self.ffn_hidden_size or -(-8 * self.hidden_size // 3 // 128) * 128

    @property
    def sizes(self) -> tuple[Size, ...]:
        """Every height and hidden_size of latents; an image names its own by the index in this list."""
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
