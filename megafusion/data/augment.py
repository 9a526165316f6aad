"""Images kept as pixels: decoded from compressed bytes, cropped and mirrored each time they are used."""

import io
import warnings
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from PIL import Image

from megafusion.data.config import DataConfig
from megafusion.data.document_format import CorruptBytes

T = TypeVar("T")


class TooManyPixels(CorruptBytes):
    """An image whose header gives more pixels than Pillow's limit."""


def open_image(content: bytes) -> Image.Image:
    """An image of a shard, which is WebP. Raises CorruptBytes if it does not decode or is too large."""
    return open_untrusted(content, ("WEBP",), lambda image: image.convert("RGB"))


def image_size(content: bytes) -> tuple[int, int]:
    """Height and width in pixels, from the header of an image of a shard. Raises CorruptBytes."""
    return open_untrusted(content, ("WEBP",), lambda image: (image.height, image.width))


def open_untrusted(content: bytes, formats: tuple[str, ...], convert: Callable[[Image.Image], T]) -> T:
    """Open an image of one of the formats and return `convert` of it, which decodes it.

    Raises CorruptBytes if it does not decode, and TooManyPixels before decoding.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content), formats=formats) as image:
                return convert(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise TooManyPixels("an image with too many pixels") from error
    except Exception as error:  # Pillow raises many kinds: OSError, SyntaxError, struct.error, ...
        raise CorruptBytes("an image that cannot be opened") from error


def augment(
    content: bytes, size: tuple[int, int], config: DataConfig, generator: np.random.Generator
) -> np.ndarray:
    """Decode an image of a shard, crop it, resize it to (height, width) and mirror it: uint8 [3, H, W].

    The crop is the largest centred box of the aspect of `size`; if `config.crop` is below 1, a random box
    that keeps at least that share of its sides. Mirrored with probability `config.flip`. Without either
    nothing is sampled, so the rest of the document is as it is with stored latents. Raises CorruptBytes.
    """
    height, width = size
    image = open_image(content)
    scale, x, y = generator.random(3) if config.crop < 1 else (1.0, 0.5, 0.5)
    fit = min(image.width / width, image.height / height) * (config.crop + (1 - config.crop) * scale)
    left, top = x * (image.width - fit * width), y * (image.height - fit * height)
    box = (left, top, left + fit * width, top + fit * height)
    resized = image.resize((width, height), Image.Resampling.LANCZOS, box=box)
    if config.flip and generator.random() < config.flip:
        resized = resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.ascontiguousarray(np.asarray(resized).transpose(2, 0, 1))
