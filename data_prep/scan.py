"""The first pass: reads, checks and hashes every record, and writes one table per input split.

So it is known which documents there are, and in which shard each belongs, before any shard is written.
"""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pyarrow
from pyarrow import parquet

from data_prep.config import PreprocessConfig
from data_prep.filters import RecordInfo, inspect_record, plain_key
from data_prep.readers.jsonl import count_lines
from data_prep.readers.records import BadRecord, Dropped, Reader, Record
from data_prep.readers.splits import InputSplit
from data_prep.readers.webdataset import NO_IMAGE
from megafusion.errors import UserError
from megafusion.storage import file_sha256, write_file

T = TypeVar("T")
NO_INFO = RecordInfo(b"")
WAY_OUT = "fix or remove it, or set on_error=skip"
SCHEMA = pyarrow.schema(
    [
        ("key", pyarrow.string()),
        ("location", pyarrow.string()),
        ("reason", pyarrow.string()),
        ("is_bad", pyarrow.bool_()),
        ("num_lost", pyarrow.int64()),
        ("content_hash", pyarrow.binary()),
        ("phash", pyarrow.uint64()),
        ("width", pyarrow.int32()),
        ("height", pyarrow.int32()),
    ]
)


def scan_split(
    split: InputSplit,
    open_reader: Callable[[], Reader],
    config: PreprocessConfig,
    selected_keys: set[str] | None,
    out: Path,
    count: Callable[[int], None],
) -> None:
    """Write a split's table: a row per record, and the hash of every file that was read.

    selected_keys: keys of the records to inspect; None: all. Raises UserError for a bad record, by on_error.
    """
    read = split.files if split.opens_file else ()
    files = {str(file): [*file_stat(file), file_sha256(file)] for file in read}
    rows = []
    inspect = partial(inspect_record, config=config)
    for record, info, error in read_records(split, open_reader, inspect, config.on_error, selected_keys):
        count(1)
        reason = error.reason if error else None
        is_bad = isinstance(error, BadRecord)  # and not Dropped by a filter
        num_lost = error.num_lost if isinstance(error, BadRecord) else 1
        rows.append((record.key, json.dumps(record.location), reason, is_bad, num_lost, *(info or NO_INFO)))
    table = pyarrow.Table.from_pylist([dict(zip(SCHEMA.names, row, strict=True)) for row in rows], SCHEMA)
    sink = pyarrow.BufferOutputStream()
    metadata = {"files": json.dumps(files), "lines": json.dumps(_num_lines(split))}
    parquet.write_table(table.replace_schema_metadata(metadata), sink)
    write_file(out, sink.getvalue().to_pybytes())


def table_path(work: Path, split: int) -> Path:
    """Path of a split's table."""
    return work / "scan" / f"{split:06d}.parquet"


def read_records(
    split: InputSplit,
    open_reader: Callable[[], Reader],
    inspect: Callable[[Any], T],
    on_error: str,
    selected_keys: set[str] | None,
) -> Iterator[tuple[Record, T | None, BadRecord | Dropped | None]]:
    """Each record with what `inspect` makes of it, or with why it is bad or dropped.

    Raises UserError for a bad one if on_error is "fail".
    """
    try:
        reader = open_reader()
    except BadRecord as error:
        if on_error == "fail":
            raise UserError(f"{split.files[0]}: {error}; {WAY_OUT}") from error
        yield Record(""), None, error
        return
    for record in reader.records(*split.span):
        if selected_keys is not None and record.key and plain_key(record.key) not in selected_keys:
            continue
        try:
            if record.problem == NO_IMAGE:
                raise Dropped(record.problem)
            if record.problem:
                raise BadRecord(record.problem, num_lost=record.num_lost)
            yield record, inspect(reader.read(record)), None
        except BadRecord as error:
            if on_error == "fail":
                raise UserError(f"{reader.where(_renumbered(split, record))}: {error}; {WAY_OUT}") from error
            yield record, None, error
        except Dropped as error:
            yield record, None, error


def _num_lines(split: InputSplit) -> int:
    """Number of lines in a part of a text file, by which the next parts' lines are renumbered; else 0."""
    is_lines = split.span and split.form != "parquet"
    return count_lines(split.files[0], *split.span) if is_lines else 0


def _renumbered(split: InputSplit, record: Record) -> Record:
    """A record whose key is its number in the complete file."""
    if not split.span or split.opens_file or split.form == "parquet":
        return record
    return Record(str(int(record.key) + count_lines(split.files[0], 0, split.span[0])), record.location)


def file_stat(path: Path) -> tuple[int, int]:
    """Size in bytes and modification time in nanoseconds."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns
