"""Parquet: image-caption pairs and texts; `interleaved` adds documents."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from pyarrow.parquet import ParquetFile

from data_prep.readers.records import BadRecord, Dropped, RawPair, Record
from data_prep.readers.webdataset import NO_IMAGE
from megafusion.errors import UserError


class ParquetReader:
    """Base of the readers of parquet rows, by row group. A record's location: row group and row in it."""

    def __init__(self, path: Path, columns: list[str], optional: list[str] = []):  # noqa: B006 (never changed)
        self.path, self._cached_group = path, -1
        try:
            self._file = ParquetFile(path)
        except (OSError, pyarrow.ArrowException) as error:
            raise BadRecord("not readable as parquet (truncated or corrupt); fetch it again") from error
        found = self._file.schema_arrow.names
        for column in columns:
            if column not in found:
                raise UserError(f"{path}: has no column {column!r}; its columns are {', '.join(found)}")
        self._columns = columns + [name for name in optional if name in found]

    def records(self, *span: int) -> Iterator[Record]:
        """A record per row, of row groups [first, end) or all; an unreadable group is one with a problem."""
        metadata, groups = self._file.metadata, range(*(span or (0, self._file.num_row_groups)))
        first = sum(metadata.row_group(group).num_rows for group in range(groups.start))
        for group in groups:
            num_rows = metadata.row_group(group).num_rows
            try:
                self._load(group)
            except BadRecord as error:
                yield Record(str(first), None, error.reason)
            else:
                yield from (Record(str(first + row), [group, row]) for row in range(num_rows))
            first += num_rows

    def row(self, record: Record) -> dict[str, Any]:
        """A row's values by column. Raises BadRecord."""
        group, row = record.location
        self._load(group)
        try:
            return {name: self._table.column(name)[row].as_py() for name in self._columns}
        except (UnicodeDecodeError, ValueError) as error:
            raise BadRecord("not UTF-8") from error

    def where(self, record: Record) -> str:
        """The file and the row, counted from 0."""
        return f"{self.path}, row {record.key}"

    def _load(self, group: int) -> None:
        if group != self._cached_group:
            try:
                self._table = self._file.read_row_group(group, columns=self._columns)
            except (OSError, pyarrow.ArrowException) as error:
                raise BadRecord("a row group is not readable as parquet") from error
            self._cached_group = group


def row_group_ranges(path: Path, num_bytes: int) -> list[tuple[int, int]]:
    """Ranges [first, end) of row groups of about `num_bytes` each; empty for an unreadable file."""
    try:
        metadata = ParquetFile(path).metadata
    except (OSError, pyarrow.ArrowException):
        return []
    ends = np.cumsum([metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)])
    firsts = np.flatnonzero(np.diff(ends // num_bytes, prepend=-1)).tolist() if len(ends) else []
    return list(itertools.pairwise([*firsts, len(ends)]))


class ParquetPairs(ParquetReader):
    """Reads images with captions; their scores are columns."""

    def __init__(self, path: Path, image_column: str, caption_column: str, scores: list[str]):
        super().__init__(path, [image_column, caption_column], scores)
        self._image_column, self._caption_column = image_column, caption_column

    def read(self, record: Record) -> RawPair:
        """A pair by its row, whose number is its key. Raises BadRecord."""
        row = self.row(record)
        caption = row[self._caption_column]
        if not isinstance(caption, str | bytes | None):
            raise BadRecord("caption is not text")
        return RawPair(record.key, image_bytes(row[self._image_column]), caption, row)


class ParquetTexts(ParquetReader):
    """Reads the texts of a column."""

    def __init__(self, path: Path, column: str):
        super().__init__(path, [column])

    def read(self, record: Record) -> str:
        """A text by its row. Raises BadRecord."""
        (value,) = self.row(record).values()
        if not isinstance(value, str):
            raise BadRecord("text is not a string")
        return value


def image_bytes(value: Any) -> bytes:
    """An encoded image, plain or as Hugging Face's {bytes, path}. Raises BadRecord, or Dropped for none."""
    if isinstance(value, dict) and (value.get("bytes") is not None or value.get("path") is None):
        value = value.get("bytes")
    if value is None:  # as img2dataset writes where a download failed
        raise Dropped(NO_IMAGE)
    if not isinstance(value, bytes):
        raise BadRecord("image is not bytes")
    return value
