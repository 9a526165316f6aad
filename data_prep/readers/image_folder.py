"""Folders of images with a .txt caption, and perhaps a .json of scores, beside each."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from data_prep.readers.records import RawPair, Record
from data_prep.readers.webdataset import parse_scores, plain_name


class ImageFolderReader:
    """Reads some images of a folder. A record's location: its index among them."""

    def __init__(self, folder: Path, images: Sequence[Path]):
        self._folder, self._images = folder, images

    def records(self) -> Iterator[Record]:
        """A record per image; its key is its path in the folder, without suffix."""
        for index, path in enumerate(self._images):
            yield Record(plain_name(str(path.relative_to(self._folder).with_suffix(""))), index)

    def read(self, record: Record) -> RawPair:
        """An image with its caption and scores. Raises BadRecord for an invalid .json."""
        path = self._images[record.location]
        caption, scores = (
            sidecar.read_bytes() if sidecar.is_file() else None for sidecar in sidecar_files(path)
        )
        return RawPair(record.key, path.read_bytes(), caption, parse_scores(scores))

    def where(self, record: Record) -> str:
        """The folder and the key."""
        return f"{self._folder}, key {record.key!r}"


def sidecar_files(image: Path) -> list[Path]:
    """Paths of the .txt and .json that may accompany an image."""
    return [image.with_suffix(suffix) for suffix in (".txt", ".json")]
