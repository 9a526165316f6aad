"""Untrusted images and texts, as found in inputs, to RGB images and clean text."""

from collections.abc import Callable
from typing import TypeVar

from PIL import Image

from data_prep.readers.records import NOT_TEXT, BadRecord
from megafusion.images import reader
from megafusion.images.reader import BadImage, read_image
from megafusion.sequence.text import clean_text

T = TypeVar("T")
MAX_CAPTION_BYTES = 1 << 16
MAX_WEBP_SIDE = 16_383


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
    if not (text := clean_input(text)):
        raise BadRecord("empty caption")
    return text


def clean_input(text: str) -> str:
    """A text as models learn it; empty if nothing is visible. Raises BadRecord for what is no text."""
    if "\0" in text:
        raise BadRecord(NOT_TEXT)
    return clean_text(text)


def open_rgb(content: bytes) -> Image.Image:
    """An encoded image's first frame as upright 8-bit RGB on white; see `read_image`. Raises BadRecord."""
    return _read(read_image, content)


def check_image(content: bytes) -> tuple[int, int]:
    """Width and height that `open_rgb` would give. Raises BadRecord for whatever it would raise it for."""
    return _read(reader.check_image, content)


def covering_size(width: int, height: int, to_height: int, to_width: int) -> tuple[int, int]:
    """Width and height of an image downscaled to the smallest size that covers another; never upscaled."""
    scale = min(1, max(to_width / width, to_height / height))
    return max(min(width, to_width), round(width * scale)), max(min(height, to_height), round(height * scale))


def _read(read: Callable[[bytes], T], content: bytes) -> T:
    try:
        return read(content)
    except BadImage as error:
        raise BadRecord(str(error)) from error
