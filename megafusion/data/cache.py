"""A folder of bounded size that caches fetched files for all processes of a machine.

A file is named by its hash and appears complete or not at all. The least recently opened file is evicted when
room is needed. Locks are flock's, which end with the process that holds them: a shared lock on a file in use,
an exclusive one on the `.partial` of a file that is being fetched, and one on `lock` while room is made. So
the folder must be on a disk whose flock works: a local one.
"""

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO, IOBase
from pathlib import Path
from typing import BinaryIO

from megafusion.data.index import INDEX
from megafusion.errors import UserError

PARTIAL = ".partial"
POLL_SECONDS = 0.02


class CacheFull(UserError):
    """All files in the cache are in use, and no room is left."""


class ShardCache:
    """Files by the hash of their content, at most `max_bytes` of them."""

    def __init__(self, folder: Path, max_bytes: int):
        self.folder, self.max_bytes = folder, max_bytes
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"data.cache_dir: {folder}: cannot be made ({error.strerror})") from error

    def open(self, name: str, size: int, fetch: Callable[[BinaryIO], None]) -> FileIO:
        """A file, fetched if it is missing; it stays in the cache until it is closed.

        fetch: writes the content into a file, or raises UserError. Raises CacheFull if there is no room.
        """
        while True:
            if file := self._open_existing(name):
                return file
            self._fetch_once(name, size, fetch)

    def _open_existing(self, name: str) -> FileIO | None:
        path = self.folder / name
        try:
            file = path.open("rb", buffering=0)
        except FileNotFoundError:
            return None
        fcntl.flock(file, fcntl.LOCK_SH)
        if _is_at(file, path):  # not evicted between open and flock
            os.utime(path)
            return file
        file.close()
        return None

    def _fetch_once(self, name: str, size: int, fetch: Callable[[BinaryIO], None]) -> None:
        """Fetch a file, or wait until another process has."""
        path, partial = self.folder / name, self.folder / (name + PARTIAL)
        try:
            with partial.open("ab+") as file:
                if not _lock(file, partial):
                    return
                try:
                    if not path.exists():
                        self._fill(partial, size, fetch)
                        partial.rename(path)
                finally:
                    partial.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(
                f"data.cache_dir: {path}: cannot be written ({error.strerror or error}); free space, lower "
                "data.cache_bytes or choose another folder"
            ) from error

    def _fill(self, partial: Path, size: int, fetch: Callable[[BinaryIO], None]) -> None:
        with partial.open("rb+") as file:
            with self._locked():
                os.ftruncate(file.fileno(), 0)
                self._make_room(size, partial)
                os.posix_fallocate(file.fileno(), 0, max(size, 1))  # reserves its space at once
            fetch(file)

    def _make_room(self, size: int, keep: Path) -> None:
        files = []
        for path in self.folder.iterdir():
            if path.name != "lock" and not path.name.startswith(".") and not path.name.endswith(INDEX):
                with suppress(FileNotFoundError):
                    status = path.stat()
                    files.append((status.st_mtime_ns, status.st_size, path))
        total = sum(num_bytes for _, num_bytes, _ in files)
        for _, num_bytes, path in sorted(files):
            if total + size <= self.max_bytes:
                return
            if path != keep and _remove_unused(path):
                total -= num_bytes
        if total + size > self.max_bytes:
            raise CacheFull(
                f"data.cache_bytes {self.max_bytes}: {total} bytes of {self.folder} are in use and the next "
                f"shard takes {size}; raise it, or make smaller shards"
            )

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.folder / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _lock(file: IOBase, path: Path) -> bool:
    """Lock a file exclusively; False once it is no longer at its path.

    Polls, because a blocking flock would keep waiting after the file is fetched: the process that fetched it
    then reads it under a shared lock.
    """
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not _is_at(file, path):
                return False
            time.sleep(POLL_SECONDS)
        else:
            return _is_at(file, path)


def _is_at(file: IOBase, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _remove_unused(path: Path) -> bool:
    """Remove a file and its index, unless a process has it open."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    except FileNotFoundError:
        return True
    except BlockingIOError:
        return False
    path.with_name(path.name + INDEX).unlink(missing_ok=True)
    return True
