"""Distortions of images: fixed corruptions to measure the classifier under, random ones to train it on."""

import torch
from torch import Tensor
from torch.nn import functional as F

BLUR_SIGMA = 2.0
"""Pixels."""
NOISE_STD = 0.1
SHIFT_PIXELS = 2
CORRUPTIONS = ("clean", "blur", "noise", "blur and noise", "shift")


def corrupt(images_N3HW: Tensor, corruption: str, seed: int = 0) -> Tensor:
    """Images [N, 3, H, W] in [0, 1] under one of CORRUPTIONS, at the strength that is measured."""
    if corruption not in CORRUPTIONS:
        raise ValueError(f"corruption {corruption!r}: use one of {', '.join(CORRUPTIONS)}")
    random = torch.Generator().manual_seed(seed)
    images = images_N3HW
    if "blur" in corruption:
        images = blur(images, BLUR_SIGMA)
    if "noise" in corruption:
        images = images + NOISE_STD * torch.randn(images.shape, generator=random)
    if corruption == "shift":
        signs = 2 * torch.randint(0, 2, (len(images), 2), generator=random) - 1
        moved = zip(images, (SHIFT_PIXELS * signs).tolist(), strict=True)
        images = torch.stack([F.pad(p, (-x, x, -y, y), value=1.0) for p, (y, x) in moved])
    return images.clamp(0, 1)


def blur(images_N3HW: Tensor, sigma: float) -> Tensor:
    """Gaussian blur, `sigma` in pixels, with replicated borders. Square images only."""
    radius = max(1, round(3 * sigma))
    offsets = torch.arange(-radius, radius + 1)
    weights = torch.exp(-0.5 * (offsets / sigma) ** 2)
    size = images_N3HW.shape[-1]
    sources = (torch.arange(size)[:, None] + offsets).clamp(0, size - 1)
    # One matrix product per side: at this size far faster on CPU than a convolution per channel.
    matrix = torch.zeros(size, size).scatter_add(1, sources, (weights / weights.sum()).expand(size, -1))
    return matrix @ images_N3HW @ matrix.T


def augment(images_N3HW: Tensor, random: torch.Generator) -> Tensor:
    """Random variants [N, 3, H, W], as a generator may draw them: warped, tinted, blurred, coarse, noisy."""
    num = len(images_N3HW)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(num, *shape, generator=random)

    scale, angle = uniform(0.85, 1.2), uniform(-0.15, 0.15)
    shift = uniform(-0.12, 0.12, 2)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    affine = torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], -1).view(num, 2, 3)
    bend = 0.04 * torch.randn(num, 2, 5, 5, generator=random)
    grid = F.affine_grid(affine, list(images_N3HW.shape), align_corners=False)
    grid = grid + F.interpolate(bend, size=grid.shape[1:3], mode="bicubic", align_corners=True).permute(
        0, 2, 3, 1
    )
    # grid_sample pads with 0 but the background is white, so shift white to 0 meanwhile.
    images = F.grid_sample(images_N3HW - 1, grid, align_corners=False) + 1
    images = images * uniform(0.85, 1.1, 3, 1, 1) + uniform(-0.06, 0.06, 1, 1, 1)

    # Resolution and blur act on whole tensors, so each is applied to one quarter of the shuffled batch.
    quarter = -(-num // 4)
    parts = list(images.split(quarter))
    for index, part in enumerate(parts):
        sample = torch.rand(2, generator=random)
        if index == 1:
            size = int(12 + 36 * sample[0])
            coarse = F.interpolate(part, size=(size, size), mode="bilinear", antialias=True)
            parts[index] = F.interpolate(
                coarse, size=part.shape[-2:], mode="bilinear" if sample[1] < 0.7 else "nearest"
            )
        elif index >= 2:
            parts[index] = blur(part, 0.3 + 2.2 * sample[0].item())
    images = torch.cat(parts)
    side = images_N3HW.shape[-1]
    for size, strength in ((side, 0.13), (side // 8, 0.08)):
        # Fine noise, and a constant error per patch, as unfinished denoising leaves them.
        noise = torch.randn(num, 3, size, size, generator=random) * uniform(0, strength, 1, 1, 1)
        images = images + F.interpolate(noise, size=images.shape[-2:])
    return images.clamp(0, 1)


def blends(images_N3HW: Tensor, random: torch.Generator, share: float = 0.5) -> tuple[Tensor, Tensor]:
    """Blends [N, 3, H, W] of each image, of which `share` is its own, with another; the other's index [N]."""
    num = len(images_N3HW)
    partner = (torch.arange(num) + torch.randint(1, num, (num,), generator=random)) % num
    if share == 0.5:  # as the committed weights were trained, bit for bit
        return (images_N3HW + images_N3HW[partner]) / 2, partner
    return share * images_N3HW + (1 - share) * images_N3HW[partner], partner
