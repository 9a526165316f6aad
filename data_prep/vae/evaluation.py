"""Evaluation of an autoencoder: latent statistics, PSNR, and a contact sheet."""

import math
from collections.abc import Iterable

import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from megafusion.images.codec import ImageCodec, encode
from megafusion.images.processor import postprocess_images

BATCH_SIZE = 64


@torch.no_grad()
def latent_statistics(model: AutoencoderKL, batches: Iterable[Tensor]) -> tuple[float, float]:
    """(scaling factor, shift factor): 1 / standard deviation and mean of the images' sampled latents."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(0)
    latents = torch.cat([encode(model, images.to(device)).sample(generator) for images in batches]).double()
    return float(1 / latents.std()), float(latents.mean())


@torch.no_grad()
def measure(codec: ImageCodec, images_N3HW: Tensor) -> tuple[dict[str, float], Tensor]:
    """Reconstruction metrics of images in [-1, 1] from their mean latents, and the reconstructions.

    On pixels in [0, 1]: psnr is the mean PSNR over images in dB, psnr_of_mean the PSNR of the mean squared
    error, l1 the mean absolute difference.
    """
    device = next(codec.model.parameters()).device
    reconstructions = torch.cat(
        [codec.decode(codec.encode(x.to(device))[0]).cpu() for x in images_N3HW.split(BATCH_SIZE)]
    )
    difference = (reconstructions - images_N3HW).double() / 2
    squared_N = difference.square().mean((1, 2, 3)).clamp(min=1e-10)
    metrics = {
        "psnr": round(float(-10 * squared_N.log10().mean()), 3),
        "psnr_of_mean": round(float(-10 * squared_N.mean().log10()), 3),
        "l1": round(float(difference.abs().mean()), 5),
    }
    return metrics, reconstructions


def contact_sheet(
    originals: Tensor, reconstructions: Tensor, num_columns: int = 12, num_rows: int = 4
) -> Image.Image:
    """Evenly spaced originals of [N, 3, H, W] in [-1, 1] above their reconstructions, as one image."""
    num_shown = min(num_columns * num_rows, len(originals))
    chosen = torch.linspace(0, len(originals) - 1, num_shown).round().long()
    size, gap = originals.shape[-1], 4
    num_rows = math.ceil(num_shown / num_columns)
    pair = 2 * size + gap
    sheet = Image.new(
        "RGB", (num_columns * (size + gap) + gap, num_rows * (pair + 3 * gap) + gap), (236, 236, 236)
    )
    pairs = zip(
        postprocess_images(originals[chosen]), postprocess_images(reconstructions[chosen]), strict=True
    )
    for i, (original, reconstruction) in enumerate(pairs):
        x = gap + (i % num_columns) * (size + gap)
        y = gap + (i // num_columns) * (pair + 3 * gap)
        sheet.paste(original, (x, y))
        sheet.paste(reconstruction, (x, y + size + gap))
    return sheet
