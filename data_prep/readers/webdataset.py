"""webdataset tars: images with captions by key. Members are read in place, never extracted."""

import json
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

from data_prep.readers.files import HEAD_BYTES, IMAGE_SUFFIXES, MAGIC
from data_prep.readers.records import UNKNOWN, BadRecord, RawPair, Record

CORRUPT_TAR = "not readable as a tar to its end (truncated, compressed or corrupt); fetch it again"
DUPLICATE_KEY = "the tar has this key twice"
NO_IMAGE = "no image"
DOTTED_KEY = "no image of this key, which ends at a name's first dot (webdataset's rule); replace the others"
OTHER_IMAGE = "image of another suffix"
ROLES = ("image", "txt", "json", OTHER_IMAGE)
# webdataset's own rule: the key ends at the first dot of the file's name.
NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")


class TarReader:
    """Reads the pairs of one tar. A record's location: offset and size of its image, caption and .json."""

    def __init__(self, path: Path):
        self.path = path
        self._file = path.open("rb", buffering=0)

    def records(self) -> Iterator[Record]:
        """A record for each run of adjacent members with the same key, as in webdataset."""
        seen: set[str] = set()
        for record in self._groups():
            if record.key in seen:
                record = Record(record.key, None, DUPLICATE_KEY)
            elif record.key:
                seen.add(record.key)
            yield record

    def read(self, record: Record) -> RawPair:
        """An image with its caption and scores. Raises BadRecord for an invalid .json."""
        members = {
            name: os.pread(self._file.fileno(), size, offset)
            for name, (offset, size) in record.location.items()
        }
        return RawPair(record.key, members["image"], members.get("txt"), parse_scores(members.get("json")))

    def where(self, record: Record) -> str:
        """The tar and the key."""
        return f"{self.path}, key {record.key!r}" if record.key else str(self.path)

    def _groups(self) -> Iterator[Record]:
        key, problem = None, None
        members: dict[str, tuple[int, int]] = {}
        num_groups, start = 0, 0
        for name, member in tar_files(self.path):
            if isinstance(member, int):  # the unfinished group may lack members: it is lost, too
                yield Record("", None, name, self._num_lost(member, num_groups, start))
                return
            if isinstance(member, str):
                yield Record(name, None, member)
                continue
            match = NAME.match(name)
            if not match:
                continue
            if match[1] != key:
                if key is not None:
                    yield _record(key, members, problem)
                    num_groups += 1
                key, members, problem, start = match[1], {}, None, member[0]
            suffix = match[2].lower()
            if suffix.rpartition(".")[2] in IMAGE_SUFFIXES and "." in suffix:
                problem = problem or DOTTED_KEY
            role = "image" if suffix in IMAGE_SUFFIXES else suffix
            if role not in ROLES and "." not in suffix and self._is_image(*member):
                role = OTHER_IMAGE
            if role in ROLES:
                if role in members:
                    problem = DUPLICATE_KEY
                members[role] = member
        if key is not None:
            yield _record(key, members, problem)

    def _num_lost(self, corrupt: int, num_groups: int, num_bytes: int) -> int:
        """Records from a corrupt header on, by the bytes of the groups before it; UNKNOWN at the end."""
        size = self.path.stat().st_size
        if corrupt + tarfile.BLOCKSIZE > size or not num_groups:  # cut, so that nothing tells
            return UNKNOWN
        return -(-(size - num_bytes) * num_groups // num_bytes)

    def _is_image(self, offset: int, size: int) -> bool:
        head = os.pread(self._file.fileno(), min(size, HEAD_BYTES), offset)
        return MAGIC["image"].match(head) is not None


def _record(key: str, members: dict[str, tuple[int, int]], problem: str | None) -> Record:
    if other := members.pop(OTHER_IMAGE, None):
        members.setdefault("image", other)
    if "image" not in members:
        problem = problem or NO_IMAGE
    elif problem == DOTTED_KEY:
        problem = None  # a further image of this key
    return Record(key, members, problem)


def tar_files(path: Path) -> Iterator[tuple[str, tuple[int, int] | str | int]]:
    """Name, and offset and size, of each regular file of a tar; or name and problem of an invalid member.

    A corrupt tar ends with (problem, where its first header that is corrupt or missing should be).
    """
    end = 0
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # else tarfile keeps all of them in memory
                end = tar.offset
                if member.isdir():
                    continue
                yield plain_name(member.name), _problem(member) or (member.offset_data, member.size)
        with path.open("rb") as file:
            file.seek(end)
            # tarfile takes an invalid or missing header for the end.
            if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                yield CORRUPT_TAR, end
    except (EOFError, ValueError, tarfile.TarError):
        yield CORRUPT_TAR, end


def _problem(member: tarfile.TarInfo) -> str | None:
    if not member.isreg() or member.issparse():
        return "a link or another member that is not a regular file"
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return "its name is a path that leads out of the tar"
    return None if member.name == plain_name(member.name) else "its name is not UTF-8"


def plain_name(name: str) -> str:
    """A file name as valid UTF-8; invalid bytes are escaped."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def parse_scores(content: bytes | None) -> dict:
    """The values of an image's .json; empty without one. Raises BadRecord."""
    if content is None:
        return {}
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BadRecord("its .json is not valid JSON, or nested too deeply") from error
    return values if isinstance(values, dict) else {}


def tar_pairs(path: Path) -> Iterator[RawPair]:
    """Every pair of a tar. Raises BadRecord naming the first invalid record."""
    reader = TarReader(path)
    for record in reader.records():
        if record.problem:
            raise BadRecord(f"{reader.where(record)}: {record.problem}")
        yield reader.read(record)
