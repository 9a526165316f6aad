"""Pictures and captions as found to what can be encoded: nothing about them is trusted."""

from PIL import Image

from data_prep.readers.records import BadRecord, Picture
from megafusion.data.augment import TooManyPixels, open_untrusted
from megafusion.data.document_format import CorruptBytes
from megafusion.images.processor import to_rgb

# Pillow would open many more, some of which run other programs.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
MAX_CAPTION_BYTES = 1 << 16


def decode_picture(picture: Picture) -> tuple[str, Image.Image]:
    """Caption, and picture as upright RGB on white. Raises BadRecord."""
    return decode_caption(picture.caption), open_rgb(picture.content)


def decode_caption(caption: bytes | str | None) -> str:
    """A caption's text. Raises BadRecord where it is none, empty, huge or not UTF-8."""
    if caption is None:
        raise BadRecord("no caption")
    if len(caption) > MAX_CAPTION_BYTES:
        raise BadRecord(f"caption of more than {MAX_CAPTION_BYTES} bytes")
    text = caption
    if isinstance(caption, bytes):
        try:
            text = caption.decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadRecord("caption is not UTF-8") from error
    text = text.strip()
    if not text:
        raise BadRecord("empty caption")
    return text


def open_rgb(content: bytes) -> Image.Image:
    """A picture's first frame as upright 8-bit RGB on white.

    Raises BadRecord, before any decoding where the header gives more pixels than Pillow's limit.
    """
    try:
        return open_untrusted(content, FORMATS, to_rgb)
    except TooManyPixels as error:
        raise BadRecord("picture of too many pixels") from error
    except CorruptBytes as error:
        raise BadRecord("picture does not decode") from error
