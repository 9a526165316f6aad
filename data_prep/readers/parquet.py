"""Parquet: image-caption pairs and texts; `interleaved` adds documents."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from pyarrow.parquet import ParquetFile

from data_prep.readers.records import UNKNOWN, BadRecord, Dropped, RawPair, Record
from data_prep.readers.webdataset import NO_IMAGE
from megafusion.errors import UserError

MAX_THRIFT_SIZE = 2**31 - 1
BATCH_BYTES, MAX_BATCH_ROWS = 16 << 20, 256
"""Rows are decoded in batches of about so many bytes; a larger row alone."""
UNREADABLE = "not readable as parquet (truncated or corrupt); fetch it again"


class ParquetReader:
    """Base of the readers of parquet rows. A record's location: row group and row in it.

    Rows are cheap to read in order. columns: by the key of the configuration that names each.
    """

    def __init__(self, path: Path, columns: dict[str, str], optional: Sequence[str] = ()):
        self.path, self._file = path, open_parquet(path)
        found = self._file.schema_arrow.names
        for key, column in columns.items():
            if column not in found:
                names = ", ".join(found)
                raise UserError(f"{path}: has no column {column!r}; set {key} to one of its columns: {names}")
        self._columns = [*columns.values(), *(name for name in optional if name in found)]
        for column in self._columns:
            if found.count(column) > 1:
                raise UserError(f"{path}: has {found.count(column)} columns {column!r}; rename all but one")
        self._group, self._start = -1, 0
        self._batch: pyarrow.RecordBatch | None = None

    def records(self, *span: int) -> Iterator[Record]:
        """A record per row, of row groups [first, end) or all; one for all unreadable rows of a group."""
        metadata, groups = self._file.metadata, range(*(span or (0, self._file.num_row_groups)))
        first = sum(metadata.row_group(group).num_rows for group in range(groups.start))
        for group in groups:
            num_rows = metadata.row_group(group).num_rows
            for row in range(num_rows):
                try:
                    self._read_to(group, row)
                except BadRecord as error:
                    yield Record(str(first + row), None, error.reason, num_rows - row)
                    break
                yield Record(str(first + row), [group, row])
            first += num_rows

    def row(self, record: Record) -> dict[str, Any]:
        """A row's values by column. Raises BadRecord."""
        group, row = record.location
        batch = self._read_to(group, row)
        try:
            return {name: batch.column(name)[row - self._start].as_py() for name in self._columns}
        except UnicodeDecodeError as error:
            raise BadRecord("not UTF-8") from error
        except (ValueError, pyarrow.ArrowException) as error:
            raise BadRecord("a value that Python cannot hold", str(error)) from error

    def where(self, record: Record) -> str:
        """The file and the row, counted from 0."""
        return f"{self.path}, row {record.key}"

    def _read_to(self, group: int, row: int) -> pyarrow.RecordBatch:
        """The batch that holds a row of a group, which begins at `_start`. Raises BadRecord."""
        if group != self._group or row < self._start:
            self._group, self._start, self._batch = group, 0, None
            self._batches = self._file.iter_batches(
                self._batch_rows(group), [group], self._columns, use_threads=False
            )
        while self._batch is None or row >= self._start + len(self._batch):
            self._start += len(self._batch) if self._batch else 0
            self._batch = None
            try:
                self._batch = next(self._batches)
            except (OSError, StopIteration, pyarrow.ArrowException) as error:
                self._group = -1
                raise bad_parquet("a row group is not readable as parquet", error) from error
        return self._batch

    def _batch_rows(self, group: int) -> int:
        metadata = self._file.metadata.row_group(group)
        columns = (metadata.column(index) for index in range(metadata.num_columns))
        names = tuple(f"{name}." for name in self._columns)
        size = sum(c.total_uncompressed_size for c in columns if f"{c.path_in_schema}.".startswith(names))
        return max(1, min(MAX_BATCH_ROWS, BATCH_BYTES * metadata.num_rows // max(size, 1)))


def open_parquet(path: Path) -> ParquetFile:
    """A parquet file, whose columns are read page by page. Raises BadRecord if it is corrupt."""
    try:
        return ParquetFile(
            path,
            pre_buffer=False,
            buffer_size=1 << 20,
            page_checksum_verification=True,
            thrift_string_size_limit=MAX_THRIFT_SIZE,
            thrift_container_size_limit=MAX_THRIFT_SIZE,
        )
    except (OSError, pyarrow.ArrowException) as error:
        raise bad_parquet(UNREADABLE, error, UNKNOWN) from error


def bad_parquet(reason: str, error: Exception, num_lost: int = 1) -> UserError:
    """A BadRecord that tells damage from what pyarrow cannot do; a UserError where memory ran out."""
    if isinstance(error, MemoryError):
        return UserError(f"memory ran out while reading parquet ({error}); lower num_workers")
    if isinstance(error, pyarrow.ArrowNotImplementedError | pyarrow.ArrowCapacityError):
        reason = f"pyarrow does not read this kind of parquet ({error})"
    return BadRecord(reason, f"pyarrow says: {error}" if reason == UNREADABLE else "", num_lost)


def row_group_ranges(path: Path, num_bytes: int) -> list[tuple[int, int]]:
    """Ranges [first, end) of row groups of about `num_bytes` each; empty for an unreadable file."""
    try:
        metadata = open_parquet(path).metadata
    except BadRecord:
        return []
    ends = np.cumsum([metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)])
    firsts = np.flatnonzero(np.diff(ends // num_bytes, prepend=-1)).tolist() if len(ends) else []
    return list(itertools.pairwise([*firsts, len(ends)]))


class ParquetPairs(ParquetReader):
    """Reads images with captions; their scores are columns."""

    def __init__(self, path: Path, image_column: str, caption_column: str, scores: list[str]):
        super().__init__(path, {"image_column": image_column, "caption_column": caption_column}, scores)
        self._image_column, self._caption_column = image_column, caption_column

    def read(self, record: Record) -> RawPair:
        """A pair by its row, whose number is its key. Raises BadRecord; Dropped for a null image."""
        row = self.row(record)
        caption = row[self._caption_column]
        if not isinstance(caption, str | bytes | None):
            raise BadRecord("caption is not text")
        return RawPair(record.key, image_bytes(row[self._image_column]), caption, row)


class ParquetTexts(ParquetReader):
    """Reads the texts of a column."""

    def __init__(self, path: Path, column: str):
        super().__init__(path, {"text_column": column})

    def read(self, record: Record) -> str:
        """A text by its row; a null is an empty one. Raises BadRecord."""
        (value,) = self.row(record).values()
        if not isinstance(value, str | None):
            raise BadRecord("text is not a string")
        return value or ""


def image_bytes(value: Any) -> bytes:
    """An encoded image, plain or as Hugging Face's {bytes, path}. Raises BadRecord; Dropped for a null."""
    if isinstance(value, dict):
        if value.get("bytes") is None and value.get("path") is not None:
            raise BadRecord("image is a path without bytes")
        value = value.get("bytes")
    if value is None:  # as img2dataset writes where a download failed
        raise Dropped(NO_IMAGE)
    if not isinstance(value, bytes):
        raise BadRecord("image is not bytes")
    return value
