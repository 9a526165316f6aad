"""Text files with a document per line, and JSON Lines."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from data_prep.readers.records import NOT_TEXT, UNKNOWN, BadRecord, Record

NO_KEY = object()
SAMPLE_BYTES = 1 << 16
"""Of the beginning of a file: tell how long its lines are."""


class LineReader:
    """Base of the readers of non-blank lines. A record's location: offset and size in bytes."""

    def __init__(self, path: Path):
        self.path = path
        self._file = path.open("rb", buffering=0)

    def records(self, first: int = 0, end: int | None = None) -> Iterator[Record]:
        """A record per line that begins in bytes [first, end); its key is its number there, from 1."""
        with self.path.open("rb") as file:
            offset = _seek_line(file, first)
            for number, line in enumerate(file, start=1):
                if end is not None and offset >= end:
                    return
                if line.strip():
                    yield Record(str(number), [offset, len(line)])
                offset += len(line)

    def line(self, record: Record) -> str:
        """A line. Raises BadRecord for what is no text in UTF-8."""
        offset, size = record.location
        content = os.pread(self._file.fileno(), size, offset)
        if b"\0" in content:
            raise BadRecord(NOT_TEXT, num_lost=self._lines_in(size))
        try:
            # Some programs write a byte order mark before the first line.
            return content.decode("utf-8" if offset else "utf-8-sig")
        except UnicodeDecodeError as error:
            is_cut = error.reason == "unexpected end of data"
            raise BadRecord("not UTF-8", num_lost=UNKNOWN if is_cut else 1) from error

    def _lines_in(self, num_bytes: int) -> int:
        """Lines that so many bytes would hold, by those at the beginning; at least one."""
        sample = os.pread(self._file.fileno(), SAMPLE_BYTES, 0).replace(b"\0", b"")
        return max(1, round(num_bytes * sample.count(b"\n") / max(len(sample), 1)))

    def where(self, record: Record) -> str:
        """The file and the line."""
        return f"{self.path}, line {record.key}"


class TextReader(LineReader):
    """Reads lines as texts."""

    def read(self, record: Record) -> str:
        """A text. Raises BadRecord."""
        return self.line(record)


class JsonlReader(LineReader):
    """Reads the texts under one key of JSON Lines."""

    def __init__(self, path: Path, key: str):
        super().__init__(path)
        self._key = key

    def read(self, record: Record) -> str:
        """A text; a null is an empty one. Raises BadRecord."""
        value = parse_json_line(self.line(record)).get(self._key, NO_KEY)
        if not isinstance(value, str | None):
            raise BadRecord(f"no string under {self._key!r}")
        return value or ""


def byte_ranges(path: Path, num_bytes: int) -> list[tuple[int, int]]:
    """Ranges [first, end) of `num_bytes` bytes that cover a file."""
    size = path.stat().st_size
    return [(first, min(first + num_bytes, size)) for first in range(0, size, num_bytes)]


def count_lines(path: Path, first: int, end: int) -> int:
    """Number of lines that begin in bytes [first, end)."""
    count, block = 0, 1 << 20
    with path.open("rb") as file:
        start = _seek_line(file, first)
        count += start < end
        while start < end - 1 and (content := file.read(min(block, end - 1 - start))):
            count += content.count(b"\n")
            start += len(content)
    return count


def _seek_line(file: BinaryIO, first: int) -> int:
    """Seek to the first line that begins at or after a byte; its offset."""
    if first:
        file.seek(first - 1)
        file.readline()
    return file.tell()


def parse_json_line(line: str) -> dict:
    """The JSON object of a line. Raises BadRecord."""
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        if line.endswith("\n"):
            raise BadRecord("not valid JSON") from error
        raise BadRecord("not valid JSON: the file ends in this line", num_lost=UNKNOWN) from error
    except (ValueError, RecursionError) as error:  # limits of this reader
        raise BadRecord("JSON nested too deeply, or with a number of thousands of digits") from error
    if "\\u" in line:  # only an escape can hold an unpaired surrogate
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise BadRecord("not UTF-8") from error
    if not isinstance(value, dict):
        raise BadRecord("not a JSON object")
    return value
