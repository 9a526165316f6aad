"""Input splits: the units that the scan distributes over processes, fixed by the input files alone."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow
from pyarrow import parquet

from data_prep.config import PreprocessConfig
from data_prep.readers.files import FORMS, Form, expand, form_of, walk
from data_prep.readers.image_folder import SIDECAR_SUFFIXES, ImageFiles, ImageFolderReader, group_images
from data_prep.readers.interleaved import (
    EDIT,
    SENTENCES,
    TEXTS,
    JsonlDocuments,
    NamedImages,
    ParquetDocuments,
)
from data_prep.readers.jsonl import JsonlReader, TextReader, byte_ranges
from data_prep.readers.parquet import ParquetPairs, ParquetTexts, row_group_ranges
from data_prep.readers.records import Reader
from data_prep.readers.webdataset import TarReader
from megafusion.data.manifest import Kind
from megafusion.errors import UserError

IMAGES_PER_SPLIT = 512
BYTES_PER_SPLIT = 64 << 20
SUFFIX = re.compile(r"\.\w{1,12}")
"""Suffixes by which ignored files are counted, so that the counts are few."""


class InputSplit(NamedTuple):
    """The input that one process scans at a time: a file, a part of one, or images of a folder."""

    number: int
    source: Path
    """The configured path by which it was found."""
    form: Form
    files: tuple[Path, ...]
    """Every file that is read: one of many records, or images with the files beside them."""
    span: tuple[int, int] | tuple[()] = ()
    """First and end, of a part of a large file: the bytes in which its lines begin, or its row groups."""
    folder: Path | None = None
    """Of images: the folder to which their keys are relative."""
    images: tuple[ImageFiles, ...] = ()

    @property
    def opens_file(self) -> bool:
        """Whether it is a complete file, or the first part of one."""
        return not self.span or self.span[0] == 0


class Inputs:
    """Every split of some inputs, in order."""

    def __init__(
        self,
        kind: Kind,
        paths: Sequence[Path],
        own: Iterable[Path] = (),
        text_column: str = "text",
        image_column: str = "image",
    ):
        """own: folders that the command writes. UserError for what is missing, of no use, or named twice."""
        self.splits: list[InputSplit] = []
        self.ignored: Counter[str] = Counter()
        """Files and folders in the inputs' folders that are not read, by reason or suffix."""
        self._kind, self._image_column = kind, image_column
        self._keys = {"pair": (), "text": (text_column,), "interleaved": (TEXTS, SENTENCES, EDIT[1])}[kind]
        self._own = {os.path.realpath(path) for path in own}
        self._seen: dict[str, Path] = {}
        for source in paths:
            found, files = expand(source), []
            for path, is_named in found:
                if path.is_dir():
                    files += self._files_in(path)
                elif path.is_file():
                    files.append((path, is_named))
                else:
                    raise UserError(f"{path}: not a file or folder")
            parents = [source] if source.is_dir() else [path.parent for path, _ in found]
            self._add(source, Path(os.path.commonpath(parents)), files)

    def _files_in(self, folder: Path) -> list[tuple[Path, bool]]:
        found = list(walk(folder, self._own, self._seen))
        self.ignored.update(reason for _, reason in found if reason)
        return [(path, False) for path in sorted(path for path, reason in found if not reason)]

    def _add(self, source: Path, folder: Path, files: list[tuple[Path, bool]]) -> None:
        """Add the splits of some files; those of images come last.

        files: each with whether it is named. folder: that to which the keys of images are relative.
        """
        forms = {path: self._form(path, is_named) for path, is_named in files}
        self._refuse_twice({path: form for path, form in forms.items() if form})
        tars = {path.with_suffix("") for path, form in forms.items() if form == "tar"}
        for path, form in forms.items():
            if form == "parquet" and self._is_statistics(path, tars):
                self.ignored["table of img2dataset"] += 1
            elif form and form != "image":
                for span in _spans(path, form):
                    self.splits.append(InputSplit(len(self.splits), source, form, (path,), span))
        images = group_images([path for path, form in forms.items() if form == "image"])
        for first in range(0, len(images), IMAGES_PER_SPLIT):
            some = tuple(images[first : first + IMAGES_PER_SPLIT])
            read = tuple(path for image in some for path in image.paths)
            self.splits.append(InputSplit(len(self.splits), source, "image", read, (), folder, some))
        unused = {path for path, form in forms.items() if not form}.difference(*(i.paths for i in images))
        self.ignored.update(
            path.suffix.lower() if SUFFIX.fullmatch(path.suffix) else "no suffix" for path in unused
        )

    def _form(self, path: Path, is_named: bool) -> Form | None:
        """UserError for a file that is named, but of no form that is read."""
        if self._kind == "pair" and not is_named and path.suffix.lower() in SIDECAR_SUFFIXES:
            return None
        form = form_of(path, self._kind, is_named, self._keys)
        if is_named and not form:
            raise UserError(f"{path}: not a file of the forms {', '.join(FORMS[self._kind])}; remove it")
        return form

    def _refuse_twice(self, forms: dict[Path, Form]) -> None:
        """UserError for a file that was already found. Links to one image may each have a caption."""
        folders = {folder: os.path.realpath(folder) for folder in {path.parent for path in forms}}
        for path, form in forms.items():
            in_folder = f"{folders[path.parent]}/{path.name}"
            real = in_folder if form == "image" else os.path.realpath(in_folder)
            if self._seen.setdefault(real, path) is not path:
                raise UserError(f"{path}: is an input twice, also as {self._seen[real]}; name it once")

    def _is_statistics(self, path: Path, tars: set[Path]) -> bool:
        """Whether it is img2dataset's table of a tar or a folder of its name, without images."""
        stem = path.with_suffix("")
        if self._kind != "pair" or stem in tars or not stem.is_dir():
            return stem in tars
        try:
            return self._image_column not in parquet.read_schema(path).names
        except (OSError, pyarrow.ArrowException):
            return False


def open_reader(kind: Kind, split: InputSplit, config: PreprocessConfig, named_images: NamedImages) -> Reader:
    """The reader of a split. Raises UserError or BadRecord where a file does not open as its suffix says."""
    if split.folder:
        return ImageFolderReader(split.folder, split.images)
    (path,) = split.files
    is_parquet = split.form == "parquet"
    if kind == "pair":
        columns = (config.image_column, config.caption_column, list(config.filters.scores))
        return ParquetPairs(path, *columns) if is_parquet else TarReader(path)
    if kind == "interleaved":
        return ParquetDocuments(path, named_images) if is_parquet else JsonlDocuments(path, named_images)
    if is_parquet:
        return ParquetTexts(path, config.text_column)
    return JsonlReader(path, config.text_column) if split.form == "jsonl" else TextReader(path)


def _spans(path: Path, form: Form) -> list[tuple[int, int] | tuple[()]]:
    """Parts of a large file: row groups, or lines by their bytes; else one that is the complete file.

    Tars are never cut: a duplicate key is known by all keys before it, a member's start by the one before.
    """
    spans: list[tuple[int, int]] = []
    if path.stat().st_size > BYTES_PER_SPLIT and form != "tar":
        spans = (row_group_ranges if form == "parquet" else byte_ranges)(path, BYTES_PER_SPLIT)
    return list(spans) if len(spans) > 1 else [()]
