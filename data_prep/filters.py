"""Filters: which records are kept, and the hashes by which duplicates are found."""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import imagehash

from data_prep.config import FilterConfig, PreprocessConfig
from data_prep.images import (
    MAX_WEBP_SIDE,
    check_image,
    clean_input,
    covering_size,
    decode_caption,
    open_rgb,
)
from data_prep.readers.records import BadRecord, Dropped, RawPair
from megafusion.images.sizes import nearest_size
from megafusion.storage import read_lines


class RecordInfo(NamedTuple):
    """Properties of a valid record, by which it may still be dropped as a duplicate."""

    content_hash: bytes
    """16 bytes of the SHA-256 of an image's bytes, a text, or a document's segments."""
    phash: int = 0
    """64-bit perceptual hash of a pair's image; 0 unless duplicates are perceptual."""
    width: int = 0
    """Pixels of a pair's image, upright."""
    height: int = 0
    """Pixels of a pair's image, upright."""


def read_keys(path: Path) -> set[str]:
    """The keys in a file, one per line."""
    return {plain_key(key) for key in read_lines(path)}


def plain_key(key: str) -> str:
    """A key by which records are selected: that of a tar packed as `tar -c .` begins with `./`."""
    return key.removeprefix("./")


def inspect_record(raw: Any, config: PreprocessConfig) -> RecordInfo:
    """RecordInfo of a RawPair, a text, or a document's segments. Raises BadRecord, or Dropped by a filter."""
    if isinstance(raw, RawPair):
        return _inspect_pair(raw, config)
    if isinstance(raw, str):
        if not (text := clean_input(raw)):
            raise Dropped("empty text")
        return RecordInfo(_hash([text]))
    for segment in raw:
        if isinstance(segment, bytes):
            _check_size(*check_image(segment), config)
    return RecordInfo(_hash(raw))


def _inspect_pair(pair: RawPair, config: PreprocessConfig) -> RecordInfo:
    filters, caption, phash = config.filters, decode_caption(pair.caption), 0
    if filters.duplicates == "perceptual":
        image = open_rgb(pair.image)
        width, height = image.size
    else:
        width, height = check_image(pair.image)
    _check_size(width, height, config)
    if len(caption) < filters.min_caption:
        raise Dropped("caption shorter than filters.min_caption")
    if filters.max_caption and len(caption) > filters.max_caption:
        raise Dropped("caption longer than filters.max_caption")
    for name, limits in filters.scores.items():
        score = pair.scores.get(name)
        if score is None:
            raise Dropped(f"no score {name}")
        if isinstance(score, bool) or not isinstance(score, int | float):
            raise Dropped(f"score {name} is not a number")
        if not limits.min <= score <= limits.max:
            raise Dropped(f"score {name} out of range")
    if filters.duplicates == "perceptual":
        phash = int(str(imagehash.phash(image)), 16)
    return RecordInfo(_hash([pair.image]), phash, width, height)


def _check_size(width: int, height: int, config: PreprocessConfig) -> None:
    filters, (short, long) = config.filters, sorted((width, height))
    if short < filters.min_side:
        raise Dropped("image smaller than filters.min_side")
    if filters.max_aspect and long > filters.max_aspect * short:
        raise Dropped("aspect ratio above filters.max_aspect")
    if config.image_storage == "pixels":
        size = config.image_sizes[nearest_size(height, width, config.image_sizes)]
        if max(covering_size(width, height, *size)) > MAX_WEBP_SIDE:
            raise BadRecord(f"image too long for WebP: more than {MAX_WEBP_SIDE:,} pixels when resized")


def _hash(segments: list[str | bytes]) -> bytes:
    digest = hashlib.sha256()
    for segment in segments:
        content = segment.encode() if isinstance(segment, str) else segment
        digest.update(f"{type(segment).__name__} {len(content)} ".encode())
        digest.update(content)
    return digest.digest()[:16]


class Deduplicator:
    """Finds duplicates of the records kept so far, by content hash and by perceptual hash."""

    def __init__(self, filters: FilterConfig):
        self._mode, self._max_distance = filters.duplicates, filters.max_distance
        self._content_hashes: set[bytes] = set()
        self._bands: dict[tuple[int, int], list[int]] = {}

    def duplicate_reason(self, info: RecordInfo) -> str | None:
        """Why a record is a duplicate of a kept one; None if it is not, and then it counts as kept."""
        if self._mode == "keep":
            return None
        if info.content_hash in self._content_hashes:
            return "exact duplicate"
        if self._mode == "perceptual" and info.width and self._is_near_duplicate(info.phash):
            return "perceptual duplicate"
        self._content_hashes.add(info.content_hash)
        return None

    def _is_near_duplicate(self, phash: int) -> bool:
        """Compare with kept hashes that share a band: at a distance of d, one of d + 1 bands is equal."""
        num_bands = self._max_distance + 1
        width = -(-64 // num_bands)
        bands = [(band, phash >> (band * width) & ((1 << width) - 1)) for band in range(num_bands)]
        for band in bands:
            if any((phash ^ other).bit_count() <= self._max_distance for other in self._bands.get(band, ())):
                return True
        for band in bands:
            self._bands.setdefault(band, []).append(phash)
        return False
