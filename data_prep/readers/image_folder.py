"""Folders of images with a .txt caption, and perhaps a .json of scores, beside each."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from data_prep.readers.records import RawPair, Record
from data_prep.readers.webdataset import parse_scores, plain_name

SIDECAR_SUFFIXES = (".txt", ".json")
DUPLICATE_IMAGE = "the folder has this key twice"


class ImageFiles(NamedTuple):
    """An image and the files beside it."""

    image: Path
    caption: Path | None
    scores: Path | None
    problem: str | None = None
    """Why it is bad input, as far as the names tell."""

    @property
    def paths(self) -> list[Path]:
        return [path for path in self[:3] if isinstance(path, Path)]


class ImageFolderReader:
    """Reads some images of a folder. A record's location: its index among them."""

    def __init__(self, folder: Path, images: Sequence[ImageFiles]):
        self._folder, self._images = folder, images

    def records(self) -> Iterator[Record]:
        """A record per image; its key is its path in the folder, without suffix."""
        for index, files in enumerate(self._images):
            key = str(files.image.relative_to(self._folder).with_suffix(""))
            yield Record(plain_name(key), index, files.problem)

    def read(self, record: Record) -> RawPair:
        """An image with its caption and scores. Raises BadRecord for an invalid .json."""
        image, caption, scores, _ = self._images[record.location]
        return RawPair(
            record.key,
            image.read_bytes(),
            caption.read_bytes() if caption else None,
            parse_scores(scores.read_bytes() if scores else None),
        )

    def where(self, record: Record) -> str:
        """The folder and the key."""
        return f"{self._folder}, key {record.key!r}"


def group_images(images: Sequence[Path]) -> list[ImageFiles]:
    """Each image with the caption and the scores beside it, whose suffixes may be of any case."""
    split = os.path.splitext
    beside: dict[tuple[str, str], Path] = {}
    for folder in {image.parent for image in images}:
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):  # of two, .txt comes after .TXT
                suffix = split(entry.name)[1].lower()
                if suffix in SIDECAR_SUFFIXES and entry.is_file():
                    path = folder / entry.name
                    beside[split(path)[0], suffix] = path
    keys = [split(image)[0] for image in images]
    counts = Counter(keys)
    return [
        ImageFiles(
            image,
            beside.get((key, ".txt")),
            beside.get((key, ".json")),
            DUPLICATE_IMAGE if counts[key] > 1 else None,
        )
        for image, key in zip(images, keys, strict=True)
    ]
