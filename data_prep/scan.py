"""The first pass: every record read, decoded, judged and hashed, a table a piece.

So it is settled which documents there will be, in which shard each, before any shard is made.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow
from pyarrow import parquet

from data_prep.config import PreprocessConfig
from data_prep.filters import RecordInfo, inspect_record
from data_prep.readers.inputs import InputSplit, piece_files
from data_prep.readers.lines import count_lines
from data_prep.readers.records import BadRecord, Dropped, Reader, Record
from megafusion.errors import UserError
from megafusion.storage import file_sha256, write_file

WAY_OUT = "mend or remove it, or set on_error=skip"
SCHEMA = pyarrow.schema(
    [
        ("key", pyarrow.string()),
        ("at", pyarrow.string()),
        ("reason", pyarrow.string()),
        ("bad", pyarrow.bool_()),
        ("content", pyarrow.binary()),
        ("look", pyarrow.uint64()),
        ("width", pyarrow.int32()),
        ("height", pyarrow.int32()),
    ]
)


def scan_piece(
    piece: InputSplit,
    open_reader: Callable[[], Reader],
    config: PreprocessConfig,
    wanted: set[str] | None,
    out: Path,
    count: Callable[[int], None],
) -> None:
    """Write a piece's table: a row a record, and the hash of every file that was read.

    wanted: keys of the records to look at; None: all. Raises UserError for a bad record by policy.
    """
    read = piece_files(piece) if piece.opens_file else []
    files = {str(file): [*file_stat(file), file_sha256(file)] for file in read}
    rows = []
    for record, facts, error in _judge(piece, open_reader, config, wanted):
        count(1)
        reason = error.reason if error else None
        is_bad = isinstance(error, BadRecord)  # and no choice of the filters
        rows.append((record.key, json.dumps(record.at), reason, is_bad, *facts))
    table = pyarrow.Table.from_pylist([dict(zip(SCHEMA.names, row, strict=True)) for row in rows], SCHEMA)
    sink = pyarrow.BufferOutputStream()
    about = {"files": json.dumps(files), "lines": json.dumps(_num_lines(piece))}
    parquet.write_table(table.replace_schema_metadata(about), sink)
    write_file(out, sink.getvalue().to_pybytes())


def _judge(
    piece: InputSplit, open_reader: Callable[[], Reader], config: PreprocessConfig, wanted: set[str] | None
) -> Iterator[tuple[Record, RecordInfo, BadRecord | Dropped | None]]:
    nothing = RecordInfo(b"")
    try:
        reader = open_reader()
    except BadRecord as error:
        if config.on_error == "fail":
            raise UserError(f"{piece.files[0]}: {error.reason}; {WAY_OUT}") from error
        yield Record(""), nothing, error
        return
    for record in reader.records(*piece.part):
        if wanted is not None and record.key and record.key not in wanted:
            continue
        try:
            if record.problem == "no picture":
                raise Dropped(record.problem)
            if record.problem:
                raise BadRecord(record.problem)
            yield record, inspect_record(reader.read(record), config.filters), None
        except BadRecord as error:
            if config.on_error == "fail":
                raise UserError(f"{reader.where(_numbered(piece, record))}: {error}; {WAY_OUT}") from error
            yield record, nothing, error
        except Dropped as error:
            yield record, nothing, error


def _num_lines(piece: InputSplit) -> int:
    """Lines of a part of a file of lines, by which those of the next parts are numbered; else 0."""
    is_lines = piece.part and piece.files[0].suffix.lower() != ".parquet"
    return count_lines(piece.files[0], *piece.part) if is_lines else 0


def _numbered(piece: InputSplit, record: Record) -> Record:
    """A record whose key numbers it in the whole file."""
    if piece.opens_file or piece.files[0].suffix.lower() == ".parquet":
        return record
    return Record(str(int(record.key) + count_lines(piece.files[0], 0, piece.part[0])), record.at)


def file_stat(path: Path) -> tuple[int, int]:
    """Size in bytes and time of change in nanoseconds."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns
