"""Between PIL images and tensors of pixels in [-1, 1]."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor


def to_tensor(images: Sequence[Image.Image], size: int | tuple[int, int]) -> Tensor:
    """PIL pictures of any mode and size to float [N, 3, H, W] in [-1, 1]; `size` is H = W or (H, W).

    EXIF rotation is applied, transparency is composited on white, the longer side is cropped about the
    centre, and Lanczos resizes.
    """
    height, width = (size, size) if isinstance(size, int) else size
    arrays = [np.asarray(fit_rgb(image, height, width)) for image in images]
    pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float()
    return pixels / 127.5 - 1


def fit_rgb(image: Image.Image, height: int, width: int) -> Image.Image:
    """Any PIL picture as upright 8-bit RGB of a size, as `to_tensor` shows it to the autoencoder."""
    picture = to_rgb(image)
    if picture.size == (width, height):
        return picture
    return ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL picture as upright 8-bit RGB on white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        # PIL clips 16-bit grey at 255 instead of scaling it, which turns such pictures white.
        values = np.asarray(image, dtype=np.float64)
        peak = 65535 if values.max(initial=0) > 255 or image.mode.startswith("I;16") else 255
        image = Image.fromarray(np.round(values.clip(0, peak) * (255 / peak)).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def to_pil(images_N3HW: Tensor) -> list[Image.Image]:
    """Pictures [N, 3, H, W] in [-1, 1] (clamped) to 8-bit RGB."""
    pixels = ((images_N3HW.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(array) for array in pixels.permute(0, 2, 3, 1).cpu().numpy()]
