"""Interleaved documents as OBELICS has them (JSON lines or parquet) or as MMC4 has (JSON lines).

OBELICS: two lists of one length, `texts` and `images`. MMC4: sentences in `text_list`, and in `image_info`
images that are each matched to one of them.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data_prep.readers.lines import LineReader, json_line
from data_prep.readers.records import BadRecord, Record
from data_prep.readers.tables import TableReader, picture_bytes
from data_prep.readers.tars import tar_files
from megafusion.errors import UserError

TEXTS, IMAGES = "texts", "images"
SENTENCES, MATCHES = "text_list", "image_info"
MATCH = ("image_name", "matched_text_index")
NOWHERE = "an image that is not in document_pictures"
URL = "an image is a URL: fetch the pictures and name them as they are called in document_pictures"


class DocumentLines(LineReader):
    """Documents of JSON lines, whose images are names in a tar or folder."""

    def __init__(self, path: Path, pictures: "NamedPictures"):
        super().__init__(path)
        self._pictures = pictures

    def read(self, record: Record) -> list[str | bytes]:
        """Texts and pictures in order. Raises BadRecord."""
        return parts_of(json_line(super().read(record)), self._pictures)


class DocumentTable(TableReader):
    """Documents of parquet, whose images are bytes, or names in a tar or folder."""

    def __init__(self, path: Path, pictures: "NamedPictures"):
        super().__init__(path, [TEXTS, IMAGES])
        self._pictures = pictures

    def read(self, record: Record) -> list[str | bytes]:
        """Texts and pictures in order. Raises BadRecord."""
        return parts_of(self.row(record), self._pictures)


class NamedPictures:
    """Pictures by their names in a tar or a folder, and nothing beyond it."""

    def __init__(self, place: Path | None):
        self._place = place
        self._found: dict[str, Any] | None = None

    def __call__(self, name: str) -> bytes:
        """A picture's bytes. Raises BadRecord."""
        missing = URL if "://" in name else NOWHERE
        if self._place is None:
            raise BadRecord(
                missing
                if missing == URL
                else "an image is a name, and document_pictures names no tar or folder"
            )
        return self._of_folder(name, missing) if self._place.is_dir() else self._of_tar(name, missing)

    def _of_folder(self, name: str, missing: str) -> bytes:
        try:
            path = (self._place / name).resolve()
            if path.is_relative_to(self._place.resolve()):
                return path.read_bytes()
        except (OSError, ValueError) as error:
            raise BadRecord(missing) from error
        raise BadRecord("an image named as a path that leads out of document_pictures")

    def _of_tar(self, name: str, missing: str) -> bytes:
        if self._found is None:
            self._file = self._place.open("rb", buffering=0)
            self._found = {n: member for n, member in self._members() if isinstance(member, tuple)}
        if name not in self._found:
            raise BadRecord(missing)
        offset, size = self._found[name]
        return os.pread(self._file.fileno(), size, offset)

    def _members(self) -> Iterator[tuple[str, Any]]:
        names = set()
        for name, member in tar_files(self._place):
            if member is None:
                raise UserError(f"{self._place}: is damaged, or no plain tar; fetch or pack it again")
            if name in names:
                raise UserError(f"{self._place}: has {name!r} twice; pack it again")
            names.add(name)
            yield name, member


def parts_of(values: dict, named: Callable[[str], bytes]) -> list[str | bytes]:
    """The texts and pictures of a document, in order; its layout is known by its keys. Raises BadRecord."""
    if TEXTS in values or IMAGES in values:
        parts = _of_lists(values.get(TEXTS), values.get(IMAGES), named)
    elif SENTENCES in values and MATCHES in values:
        parts = _of_matches(values[SENTENCES], values[MATCHES], named)
    else:
        found = ascii(sorted(values)[:8])[:100]
        raise BadRecord(
            "neither `texts` and `images` (as OBELICS has) nor `text_list` and `image_info` (as MMC4 has)",
            f"its keys are {found}",
        )
    if not parts:
        raise BadRecord("an empty document")
    return parts


def _of_lists(texts: Any, images: Any, named: Callable[[str], bytes]) -> list[str | bytes]:
    """At each place a text, an image, or both in this order."""
    if not isinstance(texts, list) or not isinstance(images, list) or len(texts) != len(images):
        raise BadRecord("`texts` and `images` are not two lists of one length")
    parts: list[str | bytes] = []
    for text, image in zip(texts, images, strict=True):
        if not isinstance(text, str | None):
            raise BadRecord("a text is no string")
        if text and text.strip():
            parts.append(text.strip())
        if isinstance(image, dict) and image.get("bytes") is None:
            image = image.get("path")
        if image is not None:
            parts.append(named(image) if isinstance(image, str) else picture_bytes(image))
    return parts


def _of_matches(sentences: Any, matches: Any, named: Callable[[str], bytes]) -> list[str | bytes]:
    """Each image before the sentence that it is matched to, those of one sentence as they are listed.

    An image before its sentence, and sentences joined by a space: as OpenFlamingo, by authors of MMC4, reads
    it (open_flamingo/train/data.py). MMC4 matches one image to a sentence where it can; the order of several
    is ours.
    """
    if not isinstance(sentences, list) or not isinstance(matches, list):
        raise BadRecord("`text_list` and `image_info` are not two lists")
    before: dict[int, list[str]] = {}
    for image in matches:
        name, place = (image.get(key) if isinstance(image, dict) else None for key in MATCH)
        if not isinstance(name, str) or type(place) is not int or not 0 <= place < len(sentences):
            raise BadRecord("an image without `image_name` or a `matched_text_index` that is in `text_list`")
        before.setdefault(place, []).append(name)
    parts: list[str | bytes] = []
    for place, sentence in enumerate(sentences):
        if not isinstance(sentence, str):
            raise BadRecord("a sentence is no string")
        parts += map(named, before.get(place, []))
        if not (sentence := sentence.strip()):
            continue
        if parts and isinstance(parts[-1], str):
            parts[-1] += f" {sentence}"
        else:
            parts.append(sentence)
    return parts
