"""Interleaved documents: two lists of one length, `texts` and `images`, in JSON lines or parquet."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_prep.lines import LineReader, json_line
from data_prep.records import BadRecord, Record
from data_prep.tables import TableReader, picture_bytes
from data_prep.tars import tar_files

TEXTS, IMAGES = "texts", "images"


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
        if self._place is None:
            raise BadRecord("an image is a name, and document_pictures names no tar or folder")
        return self._of_folder(name) if self._place.is_dir() else self._of_tar(name)

    def _of_folder(self, name: str) -> bytes:
        try:
            path = (self._place / name).resolve()
            if path.is_relative_to(self._place.resolve()):
                return path.read_bytes()
        except (OSError, ValueError) as error:
            raise BadRecord("an image that is not in document_pictures") from error
        raise BadRecord("an image named as a path that leads out of document_pictures")

    def _of_tar(self, name: str) -> bytes:
        if self._found is None:
            self._file = self._place.open("rb", buffering=0)
            self._found = {n: member for n, member in tar_files(self._place) if isinstance(member, tuple)}
        if name not in self._found:
            raise BadRecord("an image that is not in document_pictures")
        offset, size = self._found[name]
        return os.pread(self._file.fileno(), size, offset)


def parts_of(values: dict, named: Callable[[str], bytes]) -> list[str | bytes]:
    """The texts and pictures of a document's two lists, in order. Raises BadRecord."""
    texts, images = values.get(TEXTS), values.get(IMAGES)
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
    if not parts:
        raise BadRecord("an empty document")
    return parts
