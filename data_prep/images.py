"""Untrusted images and captions, as found in inputs, to RGB images and text."""

from collections.abc import Callable
from typing import Any

from PIL import ExifTags, Image

from data_prep.readers.records import BadRecord, RawPair
from megafusion.data.augment import TooManyPixels, open_untrusted
from megafusion.data.document_format import CorruptBytes
from megafusion.images.processor import convert_to_rgb
from megafusion.sequence.text import clean_text

# Pillow would open many more, some of which run other programs.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
MAX_CAPTION_BYTES = 1 << 16
TRANSPOSED = (5, 6, 7, 8)
"""EXIF orientations that swap height and width."""


def decode_pair(pair: RawPair) -> tuple[str, Image.Image]:
    """Caption, and image as upright RGB on white. Raises BadRecord."""
    return decode_caption(pair.caption), open_rgb(pair.image)


def decode_caption(caption: bytes | str | None) -> str:
    """A caption's text. Raises BadRecord if it is missing, empty, too long or not UTF-8."""
    if caption is None:
        raise BadRecord("no caption")
    if len(caption) > MAX_CAPTION_BYTES:
        raise BadRecord(f"caption of more than {MAX_CAPTION_BYTES} bytes")
    try:
        text = caption.decode("utf-8") if isinstance(caption, bytes) else caption
    except UnicodeDecodeError as error:
        raise BadRecord("caption is not UTF-8") from error
    if not (text := clean_text(text)):
        raise BadRecord("empty caption")
    return text


def open_rgb(content: bytes) -> Image.Image:
    """An encoded image's first frame as upright 8-bit RGB on white.

    Raises BadRecord; before decoding, where the header gives more pixels than Pillow's limit.
    """
    return _open(content, convert_to_rgb)


def check_image(content: bytes) -> tuple[int, int]:
    """Width and height that `open_rgb` would give. Raises BadRecord for whatever it would raise it for.

    Decodes everything, because a header does not tell whether an image is complete, but JPEG at an eighth of
    its size, which takes about half the time: all of its coefficients are read, and few are transformed.
    """
    return _open(content, _upright_size)


def _upright_size(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    is_reduced = image.draft(None, (1, 1)) is not None
    size = convert_to_rgb(image).size
    if not is_reduced:
        return size
    is_transposed = image.getexif().get(ExifTags.Base.Orientation) in TRANSPOSED
    return (height, width) if is_transposed else (width, height)


def _open(content: bytes, convert: Callable[[Image.Image], Any]) -> Any:
    try:
        return open_untrusted(content, FORMATS, convert)
    except TooManyPixels as error:
        raise BadRecord("image has too many pixels") from error
    except CorruptBytes as error:
        raise BadRecord("image does not decode") from error
