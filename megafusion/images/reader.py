"""The reader of images: encoded bytes, or PIL images of any mode, to upright 8-bit RGB on white."""

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from megafusion.errors import UserError
from megafusion.storage import expand_path

T = TypeVar("T")
# Pillow would open many more, some of which run other programs.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""By EXIF orientation; from 5 on they swap height and width."""
TIFF_BITS_PER_SAMPLE, TIFF_PHOTOMETRIC = 258, 262


class BadImage(UserError):
    """An image that cannot be used, and why; the caller knows where it is."""


class TooManyPixels(BadImage):
    """An image that is too large to be decoded."""


def read_image(content: bytes) -> Image.Image:
    """An encoded image's first frame as upright 8-bit RGB on white. Raises BadImage."""
    return open_image(content, convert_to_rgb)


def load_image(path: str | Path) -> Image.Image:
    """Decode an image as preprocessing does. UserError naming the file if that fails."""
    if str(path).startswith(("http:", "https:", "data:")):
        raise UserError(f"{path!s:.80}: addresses are not fetched; give a path, or a PIL image")
    try:
        return read_image(Path(expand_path(path)).read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such image") from error
    except (OSError, ValueError) as error:  # BadImage is a ValueError
        raise UserError(f"{path}: not an image that can be used ({error})") from error


def check_image(content: bytes) -> tuple[int, int]:
    """Width and height that `read_image` would give. Raises BadImage for whatever it would raise it for.

    Decodes everything, because a header does not tell whether an image is complete, but JPEG at an eighth of
    its size, which takes about half the time: all of its coefficients are read, and few are transformed.
    """
    return open_image(content, _upright_size)


def open_image(content: bytes, convert: Callable[[Image.Image], T], formats: tuple[str, ...] = FORMATS) -> T:
    """Open an encoded image of one of the formats and return `convert` of it, which decodes it.

    Metadata that Pillow refuses are ignored. Raises BadImage if the image does not decode; before decoding,
    where the header gives more pixels than Pillow's limit.
    """
    try:
        return _open(content, convert, formats)
    except (BadImage, MemoryError):
        raise
    except Exception:  # Pillow raises many kinds: OSError, SyntaxError, struct.error, ...
        try:
            return _open(_without_metadata(content), convert, formats)
        except (BadImage, MemoryError):
            raise
        except UnidentifiedImageError as error:
            raise BadImage(f"image does not decode as {', '.join(formats)}") from error
        except Exception as error:
            raise BadImage("image does not decode") from error


def convert_to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of any mode, with EXIF rotation applied, transparency composited on white, and no metadata.

    Grey of more than 8 bits is scaled: floats from 0 to 1, 12-bit TIFF, integers from 0 to 65535 (to 255, if
    none of a 32-bit image is larger). Raises BadImage for other values.
    """
    _scale_transparent_color(image)
    image.load()
    transposition = TRANSPOSITIONS.get(_orientation(image))
    if image.mode.startswith("I") or image.mode == "F":
        image = _scale_grey(image)
    elif image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    if transposition is not None:
        image = image.transpose(transposition)
    image.info = {}  # a rotation must not be applied again
    return image


def _open(content: bytes, convert: Callable[[Image.Image], T], formats: tuple[str, ...]) -> T:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content), formats=formats) as image:
                if not isinstance(image.info.get("xmp"), bytes):
                    image.info.pop("xmp", None)  # Pillow looks for the orientation in it
                return convert(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise TooManyPixels("image has too many pixels") from error


def _without_metadata(content: bytes) -> bytes:
    """A PNG or JPEG without the metadata that Pillow may refuse, such as 3 MB of compressed text."""
    if content.startswith(b"\x89PNG"):
        kept, start = [content[:8]], 8
        while start < len(content):
            end = start + 12 + int.from_bytes(content[start : start + 4])
            name = content[start + 4 : start + 8]
            if name[:1].isupper() or name in (b"tRNS", b"eXIf"):  # the others may be ignored, by the standard
                kept.append(content[start:end])
            start = end
        return b"".join(kept)
    if content.startswith(b"\xff\xd8"):
        kept, start = [content[:2]], 2
        while content[start : start + 1] == b"\xff" and content[start + 1 : start + 2] != b"\xda":
            marker, end = content[start + 1], start + 2 + int.from_bytes(content[start + 2 : start + 4])
            is_application = 0xE0 <= marker <= 0xEF or marker == 0xFE
            # EXIF has the rotation; Adobe's segment, of 14 bytes, the color space.
            if not is_application or marker == 0xE1 or (marker == 0xEE and end - start == 16):
                kept.append(content[start:end])
            start = end
        return b"".join([*kept, content[start:]])
    return content


def _upright_size(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    is_reduced = image.draft(None, (1, 1)) is not None
    size = convert_to_rgb(image).size
    if not is_reduced:
        return size
    return (height, width) if _orientation(image) in (5, 6, 7, 8) else (width, height)


def _orientation(image: Image.Image) -> int:
    """EXIF orientation; 1 where EXIF is missing or corrupt."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # of many types
        return 1


def _scale_transparent_color(image: Image.Image) -> None:
    """Scale a PNG's transparent color as Pillow scales its pixels: it compares the numbers of the file.

    Of 16 bits the upper eight are compared.
    """
    color, tiles = image.info.get("transparency"), getattr(image, "tile", [])
    raw_mode = tiles[0][3] if tiles else None
    if raw_mode in ("L;2", "L;4") and isinstance(color, int):
        image.info["transparency"] = color * (85 if raw_mode == "L;2" else 17)
    elif raw_mode == "RGB;16B" and isinstance(color, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in color)


def _scale_grey(image: Image.Image) -> Image.Image:
    """8-bit grey of 16- and 32-bit integers and floats, which Pillow clips; with alpha if they have."""
    values, tags = np.asarray(image, np.float64), getattr(image, "tag_v2", {})
    highest = values.max(initial=0)
    if image.mode == "F" and highest <= 1:
        peak = 1
    elif tags.get(TIFF_BITS_PER_SAMPLE) == (12,):
        peak = 4095
    else:
        peak = 65535 if highest > 255 or image.mode.startswith("I;16") else 255
    if not (values.min(initial=0) >= 0 and highest <= peak) or (peak > 1 and (values % 1).any()):
        raise BadImage("image with values beyond 0 to 1 (floats) or 0 to 65535 (integers); scale them")
    color = image.info.get("transparency")
    opaque = values != color
    if (
        image.mode in ("I;16", "F") and tags.get(TIFF_PHOTOMETRIC) == 0
    ):  # 0 is white: Pillow inverts 8 bits alone
        values = peak - values
    grey = Image.fromarray(np.round(values * (255 / peak)).astype(np.uint8))
    return grey if color is None else Image.merge("LA", (grey, Image.fromarray(opaque).convert("L")))
