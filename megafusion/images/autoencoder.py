"""A diffusers AutoencoderKL or VQModel between pixels and latents, raw and with gradients.

A model with 3 f^2 input channels, f > 1, reads each f x f block of pixels as channels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from megafusion.images.codec_config import CodecConfig

if TYPE_CHECKING:  # they take longer to import than torch
    from diffusers import AutoencoderKL, VQModel
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
    from typing_extensions import TypeIs

    Model: TypeAlias = AutoencoderKL | VQModel


class Quantized:
    """The encoding of pixels by a VQModel, with gradients.

    latents [N, C, h, w]: the encoder's; codes int64 [N, h, w]: indices of the nearest vectors of the
    codebook; vectors [N, C, h, w]: these.
    """

    def __init__(self, model: VQModel, latents_NCHW: Tensor):
        self.latents = latents_NCHW
        flat_TC = latents_NCHW.detach().movedim(1, -1).flatten(0, 2)
        # Distances in float32: half precision would choose others, and cdist has none on a CPU.
        codes_T = torch.cdist(flat_TC.float(), model.quantize.embedding.weight.float()).argmin(-1)
        self.codes = codes_T.view(len(latents_NCHW), *latents_NCHW.shape[2:])
        self.vectors = codebook_vectors(model, self.codes)

    def sample(self) -> Tensor:
        """The vectors, with the gradient of the latents (straight-through); named as a posterior's."""
        return self.latents + (self.vectors - self.latents).detach()


def is_quantized(model: Model) -> TypeIs[VQModel]:
    """Whether an autoencoder has a codebook."""
    return hasattr(model, "quantize")


def encode(model: Model, pixels_N3HW: Tensor) -> DiagonalGaussianDistribution | Quantized:
    """The posterior of pixels in [-1, 1], or their quantized form; raw and with gradients."""
    encoded = model.encode(F.pixel_unshuffle(pixels_N3HW, _unshuffle(model)))
    return Quantized(model, encoded.latents) if is_quantized(model) else encoded.latent_dist


def decode(model: Model, latents_NCHW: Tensor) -> Tensor:
    """Raw latents, or vectors of a codebook, to pixels in about [-1, 1], not clamped, with gradients."""
    if not is_quantized(model):
        return F.pixel_shuffle(model.decode(latents_NCHW).sample, _unshuffle(model))
    # Its own `decode` takes codes where its configuration has lookup_from_codebook.
    is_spatial = model.config.norm_type == "spatial"
    shown = model.decoder(model.post_quant_conv(latents_NCHW), latents_NCHW if is_spatial else None)
    return F.pixel_shuffle(shown, _unshuffle(model))


def codebook_vectors(model: VQModel, codes_Nhw: Tensor) -> Tensor:
    """Vectors [N, C, h, w] of the codebook."""
    return model.quantize.embedding(codes_Nhw).movedim(-1, 1)


def _unshuffle(model: Model) -> int:
    return CodecConfig.parse(model.config, "autoencoder").unshuffle
