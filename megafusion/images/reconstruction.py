"""How near decoded images come to the originals."""

import torch
from torch import Tensor

from megafusion.images.codec import ImageCodec


@torch.no_grad()
def reconstruct(codec: ImageCodec, pixels_N3HW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of pixels in [-1, 1]: float64 mean squared and absolute error [N] on pixels in [0, 1]; decoded."""
    device = next(codec.model.parameters()).device
    decoded = codec.reconstruct(pixels_N3HW.to(device)).float().cpu()
    difference = (decoded - pixels_N3HW).double() / 2
    return difference.square().mean((1, 2, 3)), difference.abs().mean((1, 2, 3)), decoded


def reconstruction_metrics(squared_N: Tensor, absolute_N: Tensor) -> dict[str, float]:
    """psnr: mean over images in dB; psnr_of_mean: of the mean squared error; l1: mean absolute difference."""
    squared_N = squared_N.clamp(min=1e-10)
    return {
        "psnr": float(-10 * squared_N.log10().mean()),
        "psnr_of_mean": float(-10 * squared_N.mean().log10()),
        "l1": float(absolute_N.mean()),
    }
