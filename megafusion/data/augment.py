"""Pictures kept as compressed bytes: opened, cropped and mirrored when they are shown."""

import io
import warnings
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from megafusion.data.config import DataConfig
from megafusion.data.document_format import CorruptBytes


class TooManyPixels(CorruptBytes):
    """A picture whose header gives more than Pillow's limit."""


def open_picture(content: bytes) -> Image.Image:
    """A picture of a shard, which is WebP. Raises BadBytes for what is none, or has far too many pixels."""
    return open_untrusted(content, ("WEBP",), lambda picture: picture.convert("RGB"))


def picture_size(content: bytes) -> tuple[int, int]:
    """Height and width in pixels, from the header of a picture of a shard. Raises BadBytes."""
    return open_untrusted(content, ("WEBP",), lambda picture: (picture.height, picture.width))


def open_untrusted(
    content: bytes, formats: Sequence[str], convert: Callable[[Image.Image], Image.Image]
) -> Image.Image:
    """A picture of some formats, converted, which decodes it.

    Raises BadBytes where that cannot be done; TooManyPixels, before any decoding.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content), formats=formats) as picture:
                return convert(picture)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise TooManyPixels("a picture of too many pixels") from error
    except Exception as error:  # Pillow raises what it likes: OSError, SyntaxError, struct.error, ...
        raise CorruptBytes("a picture that cannot be opened") from error


def show_picture(
    content: bytes, size: tuple[int, int], config: DataConfig, generator: np.random.Generator
) -> np.ndarray:
    """A picture as it is shown this time: uint8 [3, H, W].

    The largest box of the wanted shape about the middle; where `config.crop` is below 1, a random one that
    keeps at least that share of its sides. Mirrored with probability `config.flip`. Where neither is asked
    for nothing is drawn, so the rest of the document is as it is with stored latents. Raises BadBytes.
    """
    height, width = size
    picture = open_picture(content)
    scale, x, y = generator.random(3) if config.crop < 1 else (1.0, 0.5, 0.5)
    fit = min(picture.width / width, picture.height / height) * (config.crop + (1 - config.crop) * scale)
    left, top = x * (picture.width - fit * width), y * (picture.height - fit * height)
    box = (left, top, left + fit * width, top + fit * height)
    shown = picture.resize((width, height), Image.Resampling.LANCZOS, box=box)
    if config.flip and generator.random() < config.flip:
        shown = shown.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.ascontiguousarray(np.asarray(shown).transpose(2, 0, 1))
