"""Input splits: the units that the scan distributes over processes, fixed by the input files alone."""

import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from data_prep.config import PreprocessConfig
from data_prep.readers.image_folder import ImageFolderReader, sidecar_files
from data_prep.readers.interleaved import JsonlDocuments, NamedImages, ParquetDocuments
from data_prep.readers.jsonl import JsonlReader, TextReader, byte_ranges
from data_prep.readers.parquet import ParquetPairs, ParquetTexts, row_group_ranges
from data_prep.readers.records import Reader
from data_prep.readers.webdataset import IMAGE_SUFFIXES, TarReader
from megafusion.data.manifest import Kind
from megafusion.errors import UserError

IMAGES_PER_SPLIT = 512
BYTES_PER_SPLIT = 64 << 20
COMPRESSED_SUFFIXES = {".gz", ".tgz", ".zip", ".bz2", ".xz", ".zst"}


class InputSplit(NamedTuple):
    """The input that one process scans at a time: a file, a part of one, or images of a folder."""

    number: int
    folder: Path | None
    """The folder of the images; None: one file of many records."""
    files: tuple[Path, ...]
    span: tuple[int, int] | tuple[()] = ()
    """First and end, of a part of a large file: the bytes in which its lines begin, or its row groups."""

    @property
    def opens_file(self) -> bool:
        """Whether it is a complete file, or the first part of one."""
        return not self.span or self.span[0] == 0


def find_splits(kind: Kind, config: PreprocessConfig) -> list[InputSplit]:
    """Every split of a kind's inputs, in order. UserError for a missing path."""
    paths = {"pair": config.images, "text": config.texts, "interleaved": config.documents}[kind]
    found: list[tuple] = []
    for path in paths:
        if path.is_dir():
            found += _of_folder(kind, path)
        elif path.is_file():
            found += _of_file(kind, path)
        else:
            raise UserError(f"{path}: no such file or folder to preprocess")
    return [InputSplit(number, *split) for number, split in enumerate(found)]


def open_reader(kind: Kind, split: InputSplit, config: PreprocessConfig, named_images: NamedImages) -> Reader:
    """The reader of a split. Raises UserError or BadRecord where a file does not open as its suffix says."""
    if split.folder:
        return ImageFolderReader(split.folder, split.files)
    (path,) = split.files
    suffix = path.suffix.lower()
    if suffix in COMPRESSED_SUFFIXES:
        raise _compressed(path)
    if kind == "pair":
        columns = (config.image_column, config.caption_column, list(config.filters.scores))
        return ParquetPairs(path, *columns) if suffix == ".parquet" else TarReader(path)
    if kind == "interleaved":
        if suffix == ".parquet":
            return ParquetDocuments(path, named_images)
        return JsonlDocuments(path, named_images)
    if suffix == ".parquet":
        return ParquetTexts(path, config.text_column)
    return JsonlReader(path, config.text_column) if suffix == ".jsonl" else TextReader(path)


def split_files(split: InputSplit) -> list[Path]:
    """Every file that a split reads."""
    sidecars = chain.from_iterable(map(sidecar_files, split.files)) if split.folder else ()
    return [*split.files, *(path for path in sidecars if path.is_file())]


def _compressed(path: Path) -> UserError:
    return UserError(f"{path}: is compressed, but records are read by their offset; unpack it first")


def _of_file(kind: Kind, path: Path) -> Iterator[tuple]:
    """A file, or the parts of a large one: row groups, or lines by their bytes.

    Tars are never cut: a duplicate key is known by all keys before it, a member's start by the one before.
    """
    spans: list[tuple[int, int]] = []
    if path.stat().st_size <= BYTES_PER_SPLIT:
        pass
    elif path.suffix.lower() == ".parquet":
        spans = row_group_ranges(path, BYTES_PER_SPLIT)
    elif kind != "pair":
        spans = byte_ranges(path, BYTES_PER_SPLIT)
    for span in spans if len(spans) > 1 else [()]:
        yield None, (path,), span


def _of_folder(kind: Kind, folder: Path) -> Iterator[tuple]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if kind != "pair":
        yield from chain.from_iterable(_of_file(kind, file) for file in files)
        return
    if found := next((f for f in files if f.suffix == ".tgz" or re.search(r"\.tar\.\w+$", f.name)), None):
        raise _compressed(found)
    tars = {file.with_suffix("") for file in files if file.suffix == ".tar"}
    for file in files:
        # img2dataset writes a .parquet of statistics beside each tar, without images.
        if file.suffix == ".tar" or (file.suffix == ".parquet" and file.with_suffix("") not in tars):
            yield from _of_file(kind, file)
    images = [file for file in files if file.suffix.lower().lstrip(".") in IMAGE_SUFFIXES]
    for first in range(0, len(images), IMAGES_PER_SPLIT):
        yield folder, tuple(images[first : first + IMAGES_PER_SPLIT])
