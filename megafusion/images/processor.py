"""PIL images to pixels in [-1, 1] and back, as by diffusers' VaeImageProcessor."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from megafusion.images.sizes import Size, nearest_size


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


def convert_to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of any mode, with EXIF rotation applied and transparency composited on white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        # PIL clips 16-bit grey at 255 instead of scaling it, which turns such images white.
        values = np.asarray(image, dtype=np.float64)
        peak = 65535 if values.max(initial=0) > 255 or image.mode.startswith("I;16") else 255
        image = Image.fromarray(np.round(values.clip(0, peak) * (255 / peak)).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def nearest_size_of(image: Image.Image, sizes: Sequence[Size]) -> int:
    """Index of the size nearest in aspect ratio to an image, EXIF rotation applied."""
    width, height = ImageOps.exif_transpose(image).size
    return nearest_size(height, width, sizes)
