"""Configuration of `megafusion train-vae`. Imports no torch."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from megafusion.config import Config


class ImageDataConfig(Config):
    """Which pictures the autoencoder learns from."""

    shards: list[str] = Field(min_length=1)
    """Paths or globs of WebDataset tar shards; each sample holds a .webp, .png or .jpg."""

    image_size: int = Field(default=64, gt=0)
    """Height and width in pixels, after centre-cropping and resizing."""

    held_out_fraction: float = Field(default=0.05, gt=0, lt=1)
    """Share of the key groups kept for measuring; a group is the key up to its first "-"."""

    max_held_out: int = Field(default=1024, gt=0)
    """Most held-out pictures that are measured, the first in the shards' order."""

    horizontal_flip: bool = True
    """Whether half of the training pictures, drawn at random, are mirrored."""

    shuffle_buffer: int = Field(default=8192, gt=0)
    """Compressed pictures held in memory for shuffling; an epoch that fits is shuffled perfectly."""


class LossConfig(Config):
    """What is asked of a reconstruction, and at which weight."""

    reconstruction: Literal["l1", "l2"] = "l1"
    """Mean absolute or mean squared difference of pixels in [-1, 1]; its weight is 1."""

    kl_weight: float = Field(default=1e-6, ge=0)
    """Weight of the divergence from a unit Gaussian, summed over a picture's latent numbers."""

    perceptual_weight: float = Field(default=0.0, ge=0)
    """Weight of the LPIPS distance of VGG-16 features."""

    perceptual_weights: Path | None = None
    """Safetensors file of an ImageNet VGG-16 under torchvision's names (features.0.weight, ...)."""

    perceptual_heads: Path | None = None
    """Safetensors file of LPIPS' learned channel weights (lin0.model.1.weight, ...); none: all one."""

    identity_weight: float = Field(default=0.0, ge=0)
    """Weight of the distance of MoCo v2 features."""

    identity_weights: Path | None = None
    """Safetensors file of a MoCo v2 ResNet-50 under torchvision's names (layer1.0.conv1.weight, ...)."""

    adversarial_weight: float = Field(default=0.0, ge=0)
    """Weight of the patch discriminator's opinion."""

    adversarial_start_step: int = Field(default=50_000, ge=1)
    """Step at which discriminator and adversarial term begin."""

    discriminator_channels: int = Field(default=64, gt=0)
    """Width of the discriminator's first layer."""

    discriminator_layers: int = Field(default=3, gt=0)
    """Number of its layers that halve the picture."""

    discriminator_learning_rate: float = Field(default=1e-4, gt=0)
    """Constant rate of its Adam."""


class NetworkConfig(Config):
    """Size and shape of the diffusers AutoencoderKL."""

    unshuffle: int = Field(default=1, gt=0)
    """Side of the pixel blocks that become channels before the first convolution; 1 for none."""

    channels: list[int] = Field(min_length=1)
    """Width of each resolution level, the finest first; each level after the first halves the picture."""

    layers_per_block: int = Field(default=2, gt=0)
    """Residual blocks a level in the encoder; the decoder has one more."""

    latent_channels: int = Field(default=4, gt=0)
    """Numbers a latent position."""

    norm_num_groups: int = Field(default=32, gt=0)
    """Groups of the group normalisation; must divide every width."""

    mid_block_attention: bool = True
    """Whether the middle of encoder and decoder attends over all positions."""


class OptimizationConfig(Config):
    """How long and how fast it learns."""

    num_steps: int = Field(gt=0)
    """Optimizer steps."""

    batch_size: int = Field(default=32, gt=0)
    """Pictures a step."""

    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak rate, after the warm-up and before the cosine to zero."""

    warmup_steps: int = Field(default=100, ge=0)
    """Steps over which the rate rises linearly."""

    betas: tuple[float, float] = (0.9, 0.99)
    """AdamW's decay rates."""

    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's decoupled weight decay."""

    clip_norm: float = Field(default=1.0, gt=0)
    """Largest norm of the gradient."""

    ema_decay: float = Field(default=0.999, ge=0, lt=1)
    """Decay of the averaged weights that are saved; 0 saves the last ones."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the networks while training; weights, averages and measuring stay fp32."""

    evaluate_every: int = Field(default=500, gt=0)
    """Steps between measurements on the held-out pictures."""

    checkpoint_every: int = Field(default=1000, gt=0)
    """Steps between saves of the unfinished training, in OUT.training; it goes when the training ends."""


class AutoencoderConfig(Config):
    """Everything that `train-vae` needs."""

    out: Path
    """Folder to write; must not exist, or hold nothing but an earlier autoencoder."""

    data: ImageDataConfig
    network: NetworkConfig
    loss: LossConfig = LossConfig()
    optimization: OptimizationConfig

    seed: int = 0
    """Fixes initial weights, order of pictures, flips and latent noise."""

    device: str = "auto"
    """Where to train: cpu, cuda, cuda:1, ... or auto, the first GPU if there is one."""

    num_threads: int = Field(default=0, ge=0)
    """CPU threads of torch; 0 leaves the choice to torch."""
