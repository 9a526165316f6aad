"""Files of lines: a text a line, or JSON."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from data_prep.readers.records import BadRecord, Record


class LineReader:
    """The lines of a file that hold anything; a record's place: offset and size."""

    def __init__(self, path: Path):
        self.path = path
        self._file = path.open("rb", buffering=0)

    def records(self, first: int = 0, end: int | None = None) -> Iterator[Record]:
        """A record a line that begins in bytes [first, end), which its key numbers from 1 on there."""
        with self.path.open("rb") as file:
            offset = _seek_line(file, first)
            for number, line in enumerate(file, start=1):
                if end is not None and offset >= end:
                    return
                if line.strip():
                    yield Record(str(number), [offset, len(line)])
                offset += len(line)

    def read(self, record: Record) -> str:
        """A line. Raises BadRecord where it is not UTF-8."""
        offset, size = record.at
        try:
            # Some programs put a mark before a file's first line.
            return os.pread(self._file.fileno(), size, offset).decode("utf-8" if offset else "utf-8-sig")
        except UnicodeDecodeError as error:
            raise BadRecord("not UTF-8") from error

    def where(self, record: Record) -> str:
        """The file and the line."""
        return f"{self.path}, line {record.key}"


class JsonReader(LineReader):
    """The texts of one key of JSON lines."""

    def __init__(self, path: Path, key: str):
        super().__init__(path)
        self._key = key

    def read(self, record: Record) -> str:
        """A text. Raises BadRecord."""
        value = json_line(super().read(record)).get(self._key)
        if not isinstance(value, str):
            raise BadRecord(f"no string under {self._key!r}")
        return value


def byte_parts(path: Path, num_bytes: int) -> list[tuple[int, int]]:
    """The bytes of a file, so many at a time: first and end."""
    size = path.stat().st_size
    return [(first, min(first + num_bytes, size)) for first in range(0, size, num_bytes)]


def count_lines(path: Path, first: int, end: int) -> int:
    """Lines that begin in bytes [first, end)."""
    count, block = 0, 1 << 20
    with path.open("rb") as file:
        start = _seek_line(file, first)
        count += start < end
        while start < end - 1 and (content := file.read(min(block, end - 1 - start))):
            count += content.count(b"\n")
            start += len(content)
    return count


def _seek_line(file: BinaryIO, first: int) -> int:
    """Go to where the first line begins at or after a byte."""
    if first:
        file.seek(first - 1)
        file.readline()
    return file.tell()


def json_line(line: str) -> dict:
    """A line's mapping. Raises BadRecord."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadRecord("no JSON") from error
    if "\\u" in line:  # half a character can be written so, and in no other way
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise BadRecord("not UTF-8") from error
    if not isinstance(value, dict):
        raise BadRecord("no mapping")
    return value
