"""Configuration of the model."""

import math
from fnmatch import fnmatchcase
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from megafusion.config import Config
from megafusion.images.sizes import Size, format_sizes

BackendName = Literal["auto", "sdpa", "flex", "interval", "flash"]  # modules in model/attention/
AdapterName = Literal["linear", "unet"]  # modules in model/adapters/
Grid = tuple[int, int]  # rows and columns of patches in an image
Positive = Annotated[int, Field(gt=0)]


class RopeScaling(Config):
    """Frequencies of a model that was extended to more positions; the defaults are Llama 3.1's."""

    kind: Literal["llama3"] = "llama3"
    """How rotary frequencies are scaled, where model.rope_scaling is given: llama3 alone."""
    factor: float = Field(8.0, ge=1)
    """Divides the low frequencies: by how much longer the context has become."""
    low_freq_factor: float = Field(1.0, gt=0)
    """Low frequencies, divided in full, have wavelengths of more than original_max_position_embeddings /
    low_freq_factor."""
    high_freq_factor: float = Field(4.0, gt=0)
    """High frequencies, kept, have wavelengths of less than original_max_position_embeddings /
    high_freq_factor; between the two the scaling is interpolated."""
    original_max_position_embeddings: int = Field(8192, gt=0)
    """Positions that the model was first trained for."""

    @model_validator(mode="after")
    def _consistent(self) -> "RopeScaling":
        low, high = self.low_freq_factor, self.high_freq_factor
        if low >= high:
            raise ValueError(f"low_freq_factor {low} must be less than high_freq_factor {high}")
        return self


class LoraConfig(Config):
    """Low-rank adaptation of linear layers (LoRA, arXiv 2106.09685); all other weights are frozen."""

    rank: int = Field(16, gt=0, le=4096)
    """Rank of the update of a layer's weight, where train.lora is given."""
    alpha: float = Field(16.0, gt=0)
    """The update counts alpha / rank times."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of a layer's inputs that its update does not see in training."""
    targets: tuple[str, ...] = Field(
        ("attention.qkv", "attention.out", "feed_forward.gate_up", "feed_forward.down"), min_length=1
    )
    """Linear layers of the blocks that are adapted: their names or the ends of these, as in PEFT, or
    patterns, such as blocks.[01].*."""

    @property
    def scale(self) -> float:
        """How many times an update counts."""
        return self.alpha / self.rank

    def adapts(self, module: str) -> bool:
        """Whether the linear layer of this name, blocks.N.attention.qkv, is adapted."""
        return any(fnmatchcase(module, each) or module.endswith(f".{each}") for each in self.targets)


def is_lora_weight(name: str) -> bool:
    """Whether a weight's canonical name is that of a LoRA update."""
    return ".lora_a." in name or ".lora_b." in name


class ModelConfig(Config):
    """Architecture of the model."""

    renamed_keys: ClassVar[dict[str, str]] = {
        "width": "hidden_size",
        "hidden_width": "ffn_hidden_size",
        "norm_epsilon": "norm_eps",
        "latent_shape": "latent_channels latent_downsampling image_sizes",
        "more_sizes": "image_sizes",
    }
    keys_from_data: ClassVar[tuple[str, ...]] = (
        "latent_channels",
        "latent_downsampling",
        "image_sizes",
        "vocab_size",
    )
    max_integer: ClassVar[int] = 2**20

    num_layers: int = Field(gt=0, le=4096)
    """Transformer blocks."""
    hidden_size: int = Field(gt=0)
    """Size D of the residual stream."""
    num_heads: int = Field(gt=0)
    """Query heads."""
    num_kv_heads: int | None = Field(None, gt=0)
    """Key and value heads, fewer for grouped-query attention; num_heads by default."""
    head_dim: int | None = Field(None, gt=0, multiple_of=2)
    """Size K of an attention head; hidden_size / num_heads by default."""
    attention_bias: bool = False
    """Whether queries, keys and values have a bias, as in Qwen2."""
    qk_norm: bool = False
    """Whether each head's queries and keys are normalized (RMSNorm), as in Qwen3 and Chameleon."""
    post_norm: bool = False
    """Whether a block normalizes the outputs of attention and feed-forward, as in Swin Transformer V2 (arXiv
    2111.09883) and Chameleon, in place of their inputs."""
    ffn_hidden_size: int | None = Field(None, gt=0)
    """Size of the feed-forward's hidden layer; 8/3 of hidden_size, rounded up to 128 by default."""
    vocab_size: int = Field(gt=0)
    """The tokenizer's ids with boi and eoi, one boi more for each image size but the first, and the codes of
    the codebook; or more: a padded vocabulary. If left out, those of data.tokenizer and data.vae."""
    codebook_size: int = Field(0, ge=0)
    """Codes of the autoencoder's codebook: images are then tokens behind the text's, and predicted as these
    (Chameleon, arXiv 2405.09818), without patches and adapters. 0: images are latents, and denoised. If left
    out together with another key that data.vae gives, that of data.vae."""
    tie_embeddings: bool = False
    """Whether the language head is the embedding's weight; not with parallel.pipeline."""
    latent_channels: int = Field(ge=0)
    """Channels of an image's latents; 0 with a codebook. If left out, those of data.vae."""
    latent_downsampling: int = Field(gt=0)
    """Pixels per latent along a side: the downsampling factor of the autoencoder. If left out, that of
    data.vae."""
    image_sizes: tuple[tuple[Positive, Positive], ...] = Field(min_length=1)
    """Heights and widths of images in pixels. Each size has a begin-of-image token of its own. If left out,
    those of the sources' latents."""
    patch_size: Literal[1, 2, 4, 8]
    """Side of a patch in latents; an image takes (height / patch_size) x (width / patch_size) positions. With
    a codebook 1: a code is a position."""
    adapter: AdapterName = "linear"
    """Adapter between latents and the transformer: linear, or the paper's U-Net blocks."""
    unet_channels: int = Field(320, gt=0)
    """Channels of the U-Net adapter at full resolution; twice as many below it."""
    modality_weights: Literal["none", "feed_forward", "all"] = "none"
    """Weights of their own for image patches (mixture of transformers, arXiv 2411.04996): none; of norm and
    feed-forward; or of attention's projections and all norms too. A step costs the same FLOPs."""
    image_attention: Literal["bidirectional", "causal"] = "bidirectional"
    """Whether a patch sees its whole image, or what is before it alone, as text does: the paper's ablation.
    Codes see what is before them in any case."""
    attention: BackendName = "sdpa"
    """Attention backend: sdpa anywhere; interval, the Triton kernels on CUDA; flash, flash-attention 4 on
    CUDA (or 2, for text only); flex, PyTorch's FlexAttention; auto, the fastest supported."""
    rope_theta: float = Field(10_000.0, gt=0)
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling | None = None
    """Scaling of the rotary frequencies; none by default."""
    image_rope: Literal["1d", "2d"] = "1d"
    """Rotary positions of image patches: 1d, that in the sequence; 2d, row and column, which take turns over
    the frequencies (as M-RoPE, arXiv 2409.12191). Those of text are the same in both."""
    norm_eps: float = Field(1e-5, gt=0)
    """Added to the mean square in RMSNorm."""

    @model_validator(mode="after")
    def _consistent(self) -> "ModelConfig":
        if self.head_dim is None and (self.hidden_size % self.num_heads or self.head_size % 2):
            heads = f"hidden_size {self.hidden_size} / num_heads {self.num_heads}"
            raise ValueError(f"head_dim = {heads} must be an even integer")
        if self.num_heads % self.kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.kv_heads}")
        if bool(self.codebook_size) == bool(self.latent_channels):
            raise ValueError(
                f"codebook_size {self.codebook_size} with latent_channels {self.latent_channels}: images are "
                "codes or latents, so one of them must be 0; leave both out, or set it"
            )
        if self.image_rope == "2d" and self.head_size % 4:
            raise ValueError(
                f"image_rope 2d divides head_dim {self.head_size} into pairs for rows and columns: make it a "
                "multiple of 4, or leave image_rope out"
            )
        latent_keys = {"patch_size": 1, "adapter": "linear", "modality_weights": "none", "image_rope": "1d"}
        for key, only in latent_keys.items() if self.codebook_size else ():
            if (value := getattr(self, key)) != only:
                raise ValueError(
                    f"{key} {value}: is for images that are latents; with codebook_size set it to {only}"
                )
        patch = self.latent_downsampling * self.patch_size
        if bad := [size for size in self.image_sizes if any(side % patch for side in size)]:
            multiple = f"latent_downsampling x patch_size = {patch} pixels"
            raise ValueError(f"image_sizes: {format_sizes(bad)} is not a multiple of {multiple}")
        if len(set(self.image_sizes)) < len(self.image_sizes):
            sizes = format_sizes(self.image_sizes)
            raise ValueError(f"image_sizes: {sizes} has a size twice; name each once")
        return self

    @property
    def head_size(self) -> int:
        """Size K of an attention head."""
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def kv_heads(self) -> int:
        """Key and value heads G."""
        return self.num_kv_heads or self.num_heads

    @property
    def ffn_size(self) -> int:
        """Size of the feed-forward's hidden layer."""
        return self.ffn_hidden_size or -(-8 * self.hidden_size // 3 // 128) * 128

    @property
    def latent_sizes(self) -> tuple[Size, ...]:
        """Height and width of the latents of each image size."""
        factor = self.latent_downsampling
        return tuple((height // factor, width // factor) for height, width in self.image_sizes)

    @property
    def grids(self) -> tuple[Grid, ...]:
        """Rows and columns of patches in an image of each size."""
        patch = self.patch_size
        return tuple((height // patch, width // patch) for height, width in self.latent_sizes)

    @property
    def patches(self) -> tuple[int, ...]:
        """Number of patches of an image of each size."""
        return tuple(map(math.prod, self.grids))
