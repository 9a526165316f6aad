"""Images to latents or codes and back, by any diffusers AutoencoderKL or VQModel folder.

diffusers' models take longer to import than torch. They are imported, and the weights loaded, when a model is
first used: a training run on stored latents needs no more than the hash until it draws samples.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from megafusion.errors import UserError
from megafusion.images.autoencoder import Quantized, codebook_vectors, decode, encode, is_quantized
from megafusion.images.codec_config import CONFIG_NAME, CodecConfig, read_codec_config
from megafusion.images.processor import postprocess_images, preprocess_images
from megafusion.images.sizes import Size
from megafusion.storage import expand_path

if TYPE_CHECKING:
    from megafusion.images.autoencoder import Model

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
HASHED_KEYS = {
    "act_fn": "silu",
    "down_block_types": ("DownEncoderBlock2D",),
    "norm_num_groups": 32,
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "up_block_types": ("UpDecoderBlock2D",),
}
"""Configuration that the names and shapes of the weights do not imply, with AutoencoderKL's defaults, because
older folders leave keys out. Listed, because later versions of diffusers add keys with defaults, which must
not change the hash of the same autoencoder."""


class ImageCodec:
    """An AutoencoderKL as a map between images and latents.

    N images, H x W pixels, latents C x h x w. A model with 3 f^2 input channels, f > 1, reads each f x f
    block of pixels as channels, so that all its convolutions run at low resolution.
    """

    codebook_size = 0
    """Codes of the codebook; 0 where images become latents."""
    use_slicing = False
    """Whether images are decoded one by one, as diffusers' autoencoders do with slicing: less memory."""

    def __init__(self, model: Model) -> None:
        self._read(CodecConfig.parse(model.config, "autoencoder"))
        self.model = model.eval()

    def _read(self, config: CodecConfig) -> None:
        self.downsampling, self.latent_channels = config.downsampling, config.model_channels
        self.codebook_size = config.num_vq_embeddings
        self.scaling_factor, self.shift_factor = config.scaling_factor, config.shift_factor or 0.0

    @classmethod
    def from_pretrained(cls, path: Path | str, device: torch.device | str = "cpu") -> ImageCodec:
        """Open `path`/config.json and its safetensors weights: a QuantizedCodec if that is a VQModel.

        Raises UserError if it is neither that nor an AutoencoderKL.
        """
        path = Path(expand_path(path))
        config = read_codec_config(path)
        return (_SavedQuantizedCodec if config["_class_name"] == "VQModel" else _SavedCodec)(
            path, config, device
        )

    @staticmethod
    def of(model: Model) -> ImageCodec:
        """The codec of a diffusers model: a QuantizedCodec if that has a codebook."""
        return (QuantizedCodec if is_quantized(model) else ImageCodec)(model)

    @cached_property
    def hash(self) -> str:
        """sha256 of configuration and weights: equal on every machine, changed by any retraining."""
        return _hash(self.model.config, self.model.state_dict())

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of images of `height` x `width` pixels; C is 0 for codes.

        Raises UserError if f does not divide them.
        """
        f = self.downsampling
        if height % f or width % f or min(height, width) < f:
            raise UserError(f"image size {height} x {width}: this autoencoder needs multiples of {f} pixels")
        return self.latent_channels, height // f, width // f

    def encode_images(self, images: Sequence[Image.Image], size: Size) -> Tensor:
        """Normalised latents [N, C, h, w] of PIL images at a height and width, the mean of each posterior."""
        mean, _ = self.encode(preprocess_images(images, *size))
        return self.normalize(mean)

    def decode_images(self, latents_NCHW: Tensor) -> list[Image.Image]:
        """PIL images of normalised latents."""
        return postprocess_images(self.decode(self.denormalize(latents_NCHW)))

    def reconstruct(self, pixels_N3HW: Tensor) -> Tensor:
        """Pixels decoded from the means of the posteriors of pixels."""
        return self.decode(self.encode(pixels_N3HW)[0])

    @torch.no_grad()
    def encode(self, pixels_N3HW: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels in [-1, 1] to the raw, unscaled posterior: (mean, log variance), float32 [N, C, h, w]."""
        self.latent_shape(*pixels_N3HW.shape[-2:])
        posterior = encode(self.model, pixels_N3HW.to(self.model.device, self.model.dtype))
        assert not isinstance(posterior, Quantized), "of makes the QuantizedCodec of a VQModel"
        return posterior.mean.float(), posterior.logvar.float()

    @torch.no_grad()
    def decode(self, latents_NCHW: Tensor) -> Tensor:
        """Raw latents [N, C, h, w] to pixels [N, 3, H, W], clamped to [-1, 1]."""
        return self._decode(latents_NCHW.to(self.model.device, self.model.dtype))

    def _decode(self, latents_NCHW: Tensor) -> Tensor:
        slices = latents_NCHW.split(1) if self.use_slicing else [latents_NCHW]
        return torch.cat([decode(self.model, each).clamp(-1, 1) for each in slices])

    def normalize(self, latents: Tensor) -> Tensor:
        """Raw latents to about zero mean and unit standard deviation, which the transformer is trained on."""
        return (latents - self.shift_factor) * self.scaling_factor

    def denormalize(self, latents: Tensor) -> Tensor:
        """The inverse of `normalize`."""
        return latents / self.scaling_factor + self.shift_factor


class QuantizedCodec(ImageCodec):
    """A VQModel as a map between images and codes, int64 [N, h, w] in [0, codebook_size)."""

    def encode_images(self, images: Sequence[Image.Image], size: Size) -> Tensor:
        """Codes [N, h, w] of PIL images at a height and width."""
        return self.encode(preprocess_images(images, *size))

    def decode_images(self, codes_Nhw: Tensor) -> list[Image.Image]:
        """PIL images of codes."""
        return postprocess_images(self.decode(codes_Nhw))

    def reconstruct(self, pixels_N3HW: Tensor) -> Tensor:
        """Pixels decoded from the codes of pixels."""
        return self.decode(self.encode(pixels_N3HW))

    @torch.no_grad()
    def encode(self, pixels_N3HW: Tensor) -> Tensor:  # type: ignore[override]
        """Codes of pixels in [-1, 1]: at each position the nearest vector of the codebook."""
        self.latent_shape(*pixels_N3HW.shape[-2:])
        found = encode(self.model, pixels_N3HW.to(self.model.device, self.model.dtype))
        assert isinstance(found, Quantized)
        return found.codes

    @torch.no_grad()
    def decode(self, codes_Nhw: Tensor) -> Tensor:
        """Codes to pixels [N, 3, H, W], clamped to [-1, 1]. UserError for codes beyond the codebook."""
        codes = codes_Nhw.to(self.model.device, torch.int64)
        if codes.numel() and (codes.min() < 0 or codes.max() >= self.codebook_size):
            raise UserError(
                f"codes from {int(codes.min())} to {int(codes.max())}, but the codebook has "
                f"{self.codebook_size}; give codes of this autoencoder"
            )
        return self._decode(codebook_vectors(self.model, codes))

    def normalize(self, latents: Tensor) -> Tensor:
        """Codes as they are."""
        return latents

    denormalize = normalize


class _SavedCodec(ImageCodec):
    """The codec of a folder."""

    def __init__(self, path: Path, config: dict[str, Any], device: torch.device | str) -> None:
        self._path, self._device, self._config = path, device, config
        self._read(CodecConfig.parse(self._config, str(path / CONFIG_NAME)))
        with _user_errors(path), safe_open(path / WEIGHTS_NAME, "pt") as weights:
            # Names of old versions, which diffusers renames.
            self._is_renamed = any(".proj_attn." in name for name in weights.keys())  # noqa: SIM118

    @cached_property
    def model(self) -> Model:  # type: ignore[override]
        import diffusers

        with _user_errors(self._path):
            model, info = getattr(diffusers, self._config["_class_name"]).from_pretrained(
                self._path,
                use_safetensors=True,
                local_files_only=True,
                low_cpu_mem_usage=False,
                output_loading_info=True,
            )
        # diffusers starts the ones at random, and ignores the others.
        for fault, name in (("lack", "missing_keys"), ("have", "unexpected_keys")):
            if names := sorted(info[name]):
                raise UserError(
                    f"{self._path}: its weights {fault} {names[0]}, unlike {CONFIG_NAME}; fetch both again"
                )
        return model.to(self._device).requires_grad_(False).eval()

    @cached_property
    def hash(self) -> str:
        if self._is_renamed:
            return _hash(self.model.config, self.model.state_dict())
        weights = load_file(self._path / WEIGHTS_NAME)
        return _hash(self._config, {name: weight.float() for name, weight in weights.items()})


class _SavedQuantizedCodec(_SavedCodec, QuantizedCodec):
    """The codec of a VQModel's folder."""


def _hash(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> str:
    described = {key: config.get(key, default) for key, default in HASHED_KEYS.items()}
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for name, weight in sorted(weights.items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        values = weight.detach().cpu().contiguous().view(-1).view(torch.uint8)
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def _user_errors(path: Path) -> Iterator[None]:
    """Turn what diffusers and safetensors raise into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of many types; the user's way out is the same
        raise UserError(f"{path}: not loadable as its {CONFIG_NAME} says: {error}") from error
