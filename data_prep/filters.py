"""What a record must be to be kept, and the hashes by which duplicates are known."""

import hashlib
from typing import Any, NamedTuple

import imagehash
from PIL import Image

from data_prep.config import FilterConfig
from data_prep.images import decode_picture, open_rgb
from data_prep.readers.records import Dropped, Picture


class RecordInfo(NamedTuple):
    """What is known of a record that may be kept."""

    content: bytes
    """Hash of what must differ: a picture's bytes, a text, a document's parts; 16 bytes."""
    look: int = 0
    """pHash of a pair's picture, where it is asked for."""
    width: int = 0
    """Pixels of a pair's picture, upright."""
    height: int = 0
    """Pixels of a pair's picture, upright."""


def inspect_record(raw: Any, filters: FilterConfig) -> RecordInfo:
    """Facts of a picture, a text or a document's parts. Raises BadRecord, or Dropped by a filter."""
    if isinstance(raw, Picture):
        return _examine_picture(raw, filters)
    if isinstance(raw, str):
        if not raw.strip():
            raise Dropped("empty text")
        return RecordInfo(_hash([raw.strip()]))
    for part in raw:
        if isinstance(part, bytes):
            _check_size(open_rgb(part), filters)
    return RecordInfo(_hash(raw))


def _examine_picture(picture: Picture, filters: FilterConfig) -> RecordInfo:
    caption, image = decode_picture(picture)
    _check_size(image, filters)
    if len(caption) < filters.min_caption:
        raise Dropped("caption shorter than filters.min_caption")
    if filters.max_caption and len(caption) > filters.max_caption:
        raise Dropped("caption longer than filters.max_caption")
    for name, wanted in filters.scores.items():
        score = picture.scores.get(name)
        if isinstance(score, bool) or not isinstance(score, int | float):
            raise Dropped(f"no score {name}")
        if not wanted.least <= score <= wanted.most:
            raise Dropped(f"score {name} out of its range")
    look = int(str(imagehash.phash(image)), 16) if filters.duplicates == "perceptual" else 0
    return RecordInfo(_hash([picture.content]), look, *image.size)


def _check_size(image: Image.Image, filters: FilterConfig) -> None:
    short, long = sorted(image.size)
    if short < filters.min_side:
        raise Dropped("picture smaller than filters.min_side")
    if filters.max_aspect and long > filters.max_aspect * short:
        raise Dropped("picture longer than filters.max_aspect")


def _hash(parts: list[str | bytes]) -> bytes:
    whole = hashlib.sha256()
    for part in parts:
        content = part.encode() if isinstance(part, str) else part
        whole.update(f"{type(part).__name__} {len(content)} ".encode())
        whole.update(content)
    return whole.digest()[:16]


class Deduplicator:
    """Which records came before: by content, and by the look of pictures."""

    def __init__(self, filters: FilterConfig):
        self._kind, self._distance = filters.duplicates, filters.max_distance
        self._contents: set[bytes] = set()
        self._looks: dict[tuple[int, int], list[int]] = {}

    def duplicate(self, facts: RecordInfo) -> str | None:
        """Why a record is a duplicate of one that was kept; if it is none, it is remembered."""
        if self._kind == "keep":
            return None
        if facts.content in self._contents:
            return "exact duplicate"
        if self._kind == "perceptual" and facts.width and self._looks_alike(facts.look):
            return "perceptual duplicate"
        self._contents.add(facts.content)
        return None

    def _looks_alike(self, look: int) -> bool:
        """Hashes that differ in at most d bits agree in one of d + 1 bands of their bits."""
        num_bands = self._distance + 1
        width = -(-64 // num_bands)
        bands = [(band, look >> (band * width) & ((1 << width) - 1)) for band in range(num_bands)]
        for band in bands:
            if any((look ^ other).bit_count() <= self._distance for other in self._looks.get(band, ())):
                return True
        for band in bands:
            self._looks.setdefault(band, []).append(look)
        return False
