"""Images kept as pixels: decoded from compressed bytes, cropped and mirrored each time they are used."""

import numpy as np
from PIL import Image

from megafusion.data.config import DataConfig
from megafusion.images.reader import open_image


def decode_pixels(content: bytes) -> Image.Image:
    """An image of a shard, which is WebP. Raises BadImage if it does not decode or is too large."""
    return open_image(content, lambda image: image.convert("RGB"), ("WEBP",))


def image_size(content: bytes) -> tuple[int, int]:
    """Height and width in pixels, from the header of an image of a shard. Raises BadImage."""
    return open_image(content, lambda image: (image.height, image.width), ("WEBP",))


def augment(
    content: bytes, size: tuple[int, int], config: DataConfig, generator: np.random.Generator
) -> np.ndarray:
    """Decode an image of a shard, crop it, resize it to (height, width) and mirror it: uint8 [3, H, W].

    The crop is the largest centred box of the aspect of `size`; if `config.crop` is below 1, a random box
    that keeps at least that share of its sides. Mirrored with probability `config.flip`. Without either
    nothing is sampled, so the rest of the document is as it is with stored latents. Raises BadImage.
    """
    height, width = size
    image = decode_pixels(content)
    scale, x, y = generator.random(3) if config.crop < 1 else (1.0, 0.5, 0.5)
    fit = min(image.width / width, image.height / height) * (config.crop + (1 - config.crop) * scale)
    left, top = x * (image.width - fit * width), y * (image.height - fit * height)
    box = (left, top, left + fit * width, top + fit * height)
    resized = image.resize((width, height), Image.Resampling.LANCZOS, box=box)
    if config.flip and generator.random() < config.flip:
        resized = resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.ascontiguousarray(np.asarray(resized).transpose(2, 0, 1))
