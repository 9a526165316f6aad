"""Configuration of the autoencoder's training."""

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from data_prep.augmentation import AugmentationConfig
from megafusion.config import Config


class ImageDataConfig(Config):
    """The images that the autoencoder is trained on."""

    renamed_keys: ClassVar[dict[str, str]] = {"shards": "images"}

    images: tuple[Path, ...] = Field(min_length=1)
    """Images as in preprocessing, captioned or not: webdataset tars, parquet files, image files, folders of
    these, or patterns of paths."""
    image_column: str = "image"
    """Parquet column of an image's bytes, plain or as Hugging Face's {bytes, path}."""
    image_size: int = Field(64, gt=0, le=16_384)
    """Height and width in pixels, after center crop and resize."""
    held_out_fraction: float = Field(0.05, gt=0, lt=1)
    """Fraction of the images held out for evaluation, by a hash of their keys."""
    group_separator: str = ""
    """Keys that are equal up to the first such text are held out together; empty: each key by itself."""
    max_held_out: int = Field(1024, gt=0)
    """Maximum held-out images to evaluate, the first in the shards' order."""
    horizontal_flip: bool = True
    """Whether to flip training images with probability 0.5."""
    augmentation: AugmentationConfig | None = None
    """Random shifts and scales of training images, others in each epoch; none by default."""
    shuffle_buffer: int = Field(8192, gt=0)
    """Encoded images held in memory for shuffling; an epoch that fits is shuffled perfectly."""


class NetworkConfig(Config):
    """Architecture of the diffusers AutoencoderKL or VQModel."""

    max_integer: ClassVar[int] = 2**20

    unshuffle: int = Field(1, gt=0)
    """Side of the pixel blocks that become channels before the first convolution; 1 for none."""
    channels: list[int] = Field(min_length=1)
    """Channels of each resolution level, the finest first; each level after the first halves the image."""
    layers_per_block: int = Field(2, gt=0)
    """Residual blocks per level in the encoder; the decoder has one more."""
    latent_channels: int = Field(4, gt=0)
    """Channels of the latents, or of the codebook's vectors."""
    codebook_size: int = Field(0, ge=0)
    """Vectors of a VQModel's codebook, for models whose images are tokens; 0 for an AutoencoderKL."""
    norm_num_groups: int = Field(32, gt=0)
    """Groups of the group normalization; must divide every channel count."""
    mid_block_attention: bool = True
    """Whether the middle blocks of encoder and decoder have self-attention."""


class LossConfig(Config):
    """Terms of the loss and their weights."""

    reconstruction: Literal["l1", "l2"] = "l1"
    """Mean absolute or mean squared difference of pixels in [-1, 1]; its weight is 1."""
    kl_weight: float = Field(1e-6, ge=0)
    """Weight of the KL divergence from a unit Gaussian, summed over an image's latents; unused with a
    codebook."""
    commitment_weight: float = Field(0.25, ge=0)
    """The beta of VQ-VAE (arXiv 1711.00937): weight of the latents' squared distance to the codebook's
    vectors, which moves the encoder, beside the same distance with weight 1, which moves the vectors. Used
    with network.codebook_size alone."""
    perceptual_weight: float = Field(0.0, ge=0)
    """Weight of the LPIPS distance of VGG-16 features."""
    perceptual_weights: Path | None = None
    """Safetensors file of an ImageNet VGG-16 under torchvision's names (features.0.weight, ...)."""
    perceptual_heads: Path | None = None
    """Safetensors file of LPIPS' learned channel weights (lin0.model.1.weight, ...); none: all one."""
    identity_weight: float = Field(0.0, ge=0)
    """Weight of the distance of MoCo v2 features."""
    identity_weights: Path | None = None
    """Safetensors file of a MoCo v2 ResNet-50 under torchvision's names (layer1.0.conv1.weight, ...)."""
    adversarial_weight: float = Field(0.0, ge=0)
    """Weight of the adversarial term of a patch discriminator."""
    adversarial_start_step: int = Field(50_000, ge=1)
    """First step with discriminator and adversarial term."""
    discriminator_channels: int = Field(64, gt=0)
    """Channels of the discriminator's first layer."""
    discriminator_layers: int = Field(3, gt=0)
    """Number of its layers that halve the image."""
    discriminator_learning_rate: float = Field(1e-4, gt=0)
    """Constant learning rate of its Adam."""


class OptimizationConfig(Config):
    """Optimizer, schedule, and when to evaluate and save."""

    num_steps: int = Field(gt=0)
    """Optimizer steps."""
    batch_size: int = Field(32, gt=0)
    """Images per step."""
    learning_rate: float = Field(1e-3, gt=0)
    """Peak learning rate, between linear warmup and cosine decay to zero."""
    warmup_steps: int = Field(100, ge=0)
    """Steps of linear warmup."""
    betas: tuple[float, float] = (0.9, 0.99)
    """AdamW's betas."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's decoupled weight decay."""
    clip_norm: float = Field(1.0, gt=0)
    """Maximum gradient norm."""
    ema_decay: float = Field(0.999, ge=0, lt=1)
    """Decay of the averaged weights, which are the ones saved; 0 saves the last weights."""
    precision: Literal["auto", "fp32", "bf16"] = "fp32"
    """Autocast precision of training; weights, averages and evaluation stay fp32. auto: bf16 on a GPU and on
    a CPU that has instructions for it, else fp32."""
    evaluate_every: int = Field(500, gt=0)
    """Steps between evaluations on the held-out images."""
    checkpoint_every: int = Field(1000, gt=0)
    """Steps between checkpoints, in OUT.training; they are removed when the training ends."""


class AutoencoderConfig(Config):
    """Configuration of `train-vae`."""

    out: Path
    """Folder to write; must not exist, or hold only an earlier autoencoder."""
    overwrite: bool = False
    """Whether an earlier autoencoder in `out` may be replaced."""
    data: ImageDataConfig
    network: NetworkConfig
    loss: LossConfig = LossConfig()
    optimization: OptimizationConfig
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of initial weights, image order, flips and latent noise."""
    device: str = "auto"
    """Device to train on: cpu, cuda, cuda:1, ... or auto, the first GPU if there is one."""
    num_threads: int = Field(0, ge=0)
    """CPU threads of torch; 0 for torch's default."""

    def warnings(self) -> list[str]:
        """Values that cannot do what they say, and what happens instead."""
        optimization, loss = self.optimization, self.loss
        num_steps, warmup, start = (
            optimization.num_steps,
            optimization.warmup_steps,
            loss.adversarial_start_step,
        )
        warnings = []
        if warmup >= num_steps:
            warnings.append(
                f"optimization.warmup_steps {warmup} is not below optimization.num_steps {num_steps}: the "
                "learning rate only rises"
            )
        if loss.adversarial_weight and start > num_steps:
            warnings.append(
                f"loss.adversarial_start_step {start} is after optimization.num_steps {num_steps}: the "
                "adversarial term is never used"
            )
        return [f"warning: {warning}" for warning in warnings]
