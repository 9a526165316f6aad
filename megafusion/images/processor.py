"""PIL images to pixels in [-1, 1] and back, as by diffusers' VaeImageProcessor."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from megafusion.images.reader import convert_to_rgb


def preprocess_images(images: Sequence[Image.Image], height: int, width: int) -> Tensor:
    """PIL images of any mode and size to pixels, float [N, 3, H, W] in [-1, 1]; see `resize_and_crop`."""
    arrays = [np.asarray(resize_and_crop(image, height, width)) for image in images]
    pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float()
    return pixels / 127.5 - 1


def postprocess_images(pixels_N3HW: Tensor) -> list[Image.Image]:
    """Pixels [N, 3, H, W] in [-1, 1] (clamped) to 8-bit RGB."""
    pixels = ((pixels_N3HW.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(array) for array in pixels.permute(0, 2, 3, 1).cpu().numpy()]


def resize_and_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    """Upright 8-bit RGB of a size: the longer side is cropped about the centre, then Lanczos resizes."""
    image = convert_to_rgb(image)
    if image.size == (width, height):
        return image
    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
