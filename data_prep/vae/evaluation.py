"""Evaluation of an autoencoder: latent statistics, PSNR, and a contact sheet."""

from collections.abc import Iterable

import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from megafusion.images.autoencoder import Quantized, encode
from megafusion.images.codec import ImageCodec
from megafusion.images.grid import make_image_grid
from megafusion.images.processor import postprocess_images
from megafusion.images.reconstruction import reconstruct, reconstruction_metrics

BATCH_SIZE, NUM_SHOWN = 64, 48


@torch.no_grad()
def latent_statistics(model: AutoencoderKL, batches: Iterable[Tensor]) -> tuple[float, float]:
    """(scaling factor, shift factor): 1 / standard deviation and mean of the images' sampled latents."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(0)
    posteriors = (encode(model, images.to(device)) for images in batches)
    latents = torch.cat([p.sample(generator) for p in posteriors if not isinstance(p, Quantized)]).double()
    return float(1 / latents.std()), float(latents.mean())


def measure(codec: ImageCodec, images_N3HW: Tensor) -> tuple[dict[str, float], Tensor]:
    """Metrics of images in [-1, 1] from their mean latents or codes, rounded; and the reconstructions."""
    parts = [reconstruct(codec, images) for images in images_N3HW.split(BATCH_SIZE)]
    squared_N, absolute_N, reconstructions = (torch.cat(part) for part in zip(*parts, strict=True))
    metrics = reconstruction_metrics(squared_N, absolute_N)
    return {name: round(value, 5) for name, value in metrics.items()}, reconstructions


def contact_sheet(keys: list[str], originals: Tensor, reconstructions: Tensor) -> Image.Image:
    """Evenly spaced originals of [N, 3, H, W] in [-1, 1] beside their reconstructions, as one image."""
    chosen = torch.linspace(0, len(keys) - 1, min(NUM_SHOWN, len(keys))).round().long()
    images = (postprocess_images(pixels[chosen]) for pixels in (originals, reconstructions))
    rows = list(zip([keys[i] for i in chosen], *images, strict=True))
    return make_image_grid(rows, ("real", "decoded"), columns=6, side=max(64, originals.shape[-1]))
