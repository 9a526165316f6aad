"""webdataset tars: pictures with captions by key. Nothing is ever extracted, and links lead nowhere."""

import json
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

from data_prep.readers.records import BadRecord, Picture, Record

IMAGE_SUFFIXES = {"webp", "png", "jpg", "jpeg", "gif", "bmp", "tif", "tiff"}
DAMAGED = "not readable as a tar to its end (truncated, compressed or damaged); fetch it again"
# webdataset's own rule: the key ends at the first dot of the file's name.
NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")


class TarReader:
    """The pictures of one tar. A record's place: offset and size of its picture, caption and .json."""

    def __init__(self, path: Path):
        self.path = path
        self._file = path.open("rb", buffering=0)

    def records(self) -> Iterator[Record]:
        """Members side by side that share a key are one record, as in webdataset."""
        seen: set[str] = set()
        for record in self._groups():
            if record.key in seen:
                record = Record(record.key, None, "its key stands there twice")
            elif record.key:
                seen.add(record.key)
            yield record

    def read(self, record: Record) -> Picture:
        """A picture and what stands beside it."""
        parts = {name: os.pread(self._file.fileno(), size, at) for name, (at, size) in record.at.items()}
        return Picture(record.key, parts["picture"], parts.get("txt"), scores_of(parts.get("json")))

    def where(self, record: Record) -> str:
        """The tar and the key."""
        return f"{self.path}, key {record.key!r}" if record.key else str(self.path)

    def _groups(self) -> Iterator[Record]:
        key, parts, problem = None, {}, None
        for name, member in tar_files(self.path):
            if member is None:
                yield Record("", None, name)  # the group that was open may lack members: it goes, too
                return
            if isinstance(member, str):
                yield Record(name, None, member)
                continue
            found = NAME.match(name)
            if not found:
                continue
            if found[1] != key:
                if key is not None:
                    yield _record(key, parts, problem)
                key, parts, problem = found[1], {}, None
            suffix = found[2].lower()
            part = "picture" if suffix in IMAGE_SUFFIXES else suffix
            if part in ("picture", "txt", "json"):
                if part in parts:
                    problem = "its key stands there twice"
                parts[part] = member
        if key is not None:
            yield _record(key, parts, problem)


def _record(key: str, parts: dict, problem: str | None) -> Record:
    if "picture" not in parts:
        problem = problem or "no picture"
    return Record(key, parts, problem)


def tar_files(path: Path) -> Iterator[tuple[str, tuple[int, int] | str | None]]:
    """Name, and offset and size, of each plain file of a tar; or name and what is wrong with the member.

    A damaged tar ends with (what is wrong, None).
    """
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                tar.members = []  # or it would keep them all
                if member.isdir():
                    continue
                yield plain_name(member.name), _problem(member) or (member.offset_data, member.size)
            end = tar.offset
        with path.open("rb") as file:
            file.seek(end)
            # tarfile takes a bad header, or none, for the end.
            if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                yield DAMAGED, None
    except (EOFError, ValueError, tarfile.TarError):
        yield DAMAGED, None


def _problem(member: tarfile.TarInfo) -> str | None:
    if not member.isreg() or member.issparse():
        return "a link or another thing that is no plain file"
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return "named as a path that leads out of the tar"
    return None if member.name == plain_name(member.name) else "a name that is not UTF-8"


def plain_name(name: str) -> str:
    """A file's name as text that can be written anywhere; what is not UTF-8 in it is escaped."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def scores_of(content: bytes | None) -> dict:
    """The values of a .json that stands beside a picture; none where there is none."""
    if content is None:
        return {}
    try:
        values = json.loads(content)
    except ValueError as error:
        raise BadRecord("its .json is no JSON") from error
    return values if isinstance(values, dict) else {}


def tar_pictures(path: Path) -> Iterator[Picture]:
    """Every picture of a tar. Raises BadRecord naming the first record that is bad."""
    reader = TarReader(path)
    for record in reader.records():
        if record.problem:
            raise BadRecord(f"{reader.where(record)}: {record.problem}")
        yield reader.read(record)
