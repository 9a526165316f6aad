"""Parquet: pictures with captions, texts, interleaved documents."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from pyarrow.parquet import ParquetFile

from data_prep.readers.records import BadRecord, Picture, Record
from megafusion.errors import UserError


class TableReader:
    """The rows of one parquet file; a record's place: row group and row in it. Holds one row group."""

    def __init__(self, path: Path, columns: list[str], optional: list[str] = []):  # noqa: B006 (never changed)
        self.path, self._held = path, -1
        try:
            self._file = ParquetFile(path)
        except (OSError, pyarrow.ArrowException) as error:
            raise BadRecord("not readable as parquet (truncated or damaged); fetch it again") from error
        found = self._file.schema_arrow.names
        for column in columns:
            if column not in found:
                raise UserError(f"{path}: has no column {column!r}; its columns are {', '.join(found)}")
        self._columns = columns + [name for name in optional if name in found]

    def records(self, *part: int) -> Iterator[Record]:
        """A record a row, of row groups [first, end) or all; an unreadable group is one with a problem."""
        about, groups = self._file.metadata, range(*(part or (0, self._file.num_row_groups)))
        first = sum(about.row_group(group).num_rows for group in range(groups.start))
        for group in groups:
            size = about.row_group(group).num_rows
            try:
                self._hold(group)
            except BadRecord as error:
                yield Record(str(first), None, error.reason)
            else:
                yield from (Record(str(first + row), [group, row]) for row in range(size))
            first += size

    def row(self, record: Record) -> dict[str, Any]:
        """A row's values by column. Raises BadRecord."""
        group, row = record.at
        self._hold(group)
        try:
            return {name: self._table.column(name)[row].as_py() for name in self._columns}
        except (UnicodeDecodeError, ValueError) as error:
            raise BadRecord("not UTF-8") from error

    def where(self, record: Record) -> str:
        """The file and the row, from 0."""
        return f"{self.path}, row {record.key}"

    def _hold(self, group: int) -> None:
        if group != self._held:
            try:
                self._table = self._file.read_row_group(group, columns=self._columns)
            except (OSError, pyarrow.ArrowException) as error:
                raise BadRecord("a row group that is not readable as parquet") from error
            self._held = group


def group_parts(path: Path, num_bytes: int) -> list[tuple[int, int]]:
    """Row groups [first, end) that hold about as many bytes together; none of a file that is not readable."""
    try:
        about = ParquetFile(path).metadata
    except (OSError, pyarrow.ArrowException):
        return []
    ends = np.cumsum([about.row_group(group).total_byte_size for group in range(about.num_row_groups)])
    firsts = np.flatnonzero(np.diff(ends // num_bytes, prepend=-1)).tolist() if len(ends) else []
    return list(itertools.pairwise([*firsts, len(ends)]))


class PictureTable(TableReader):
    """Pictures with captions; their scores are columns."""

    def __init__(self, path: Path, picture: str, caption: str, scores: list[str]):
        super().__init__(path, [picture, caption], scores)
        self._picture, self._caption, self._scores = picture, caption, scores

    def read(self, record: Record) -> Picture:
        """A picture by its row, which is its key."""
        row = self.row(record)
        caption = row[self._caption]
        if not isinstance(caption, str | bytes | None):
            raise BadRecord("caption is no text")
        return Picture(record.key, picture_bytes(row[self._picture]), caption, row)


class TextTable(TableReader):
    """Texts of a column."""

    def __init__(self, path: Path, column: str):
        super().__init__(path, [column])

    def read(self, record: Record) -> str:
        """A text by its row."""
        (value,) = self.row(record).values()
        if not isinstance(value, str):
            raise BadRecord("text is no string")
        return value


def picture_bytes(value: Any) -> bytes:
    """Bytes of a picture, plain or as Hugging Face's {bytes, path}. Raises BadRecord."""
    if isinstance(value, dict):
        value = value.get("bytes")
    if not isinstance(value, bytes):
        raise BadRecord("no picture")
    return value
