"""A folder of bounded size that caches fetched shards for all processes of a machine.

A shard is named by its hash and appears complete or not at all. The least recently opened one is evicted when
room is needed. Locks are flock's, which end with the process that holds them: a shared lock on a shard in
use, an exclusive one on a shard that is being fetched, and on a `lock` file while fetching and making room.
So the folder must be on a disk whose flock works: a local one.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import BinaryIO

from megafusion.data.manifest import ShardEntry
from megafusion.data.remote import fetch
from megafusion.data.shards import INDEX
from megafusion.errors import UserError

PARTIAL = ".part"


class CacheFull(UserError):
    """All shards in the cache are in use, and no room is left."""


class ShardCache:
    """Shards by the hash of their content, at most `max_bytes` of them."""

    def __init__(self, folder: Path, max_bytes: int):
        self.folder, self.max_bytes = folder, max_bytes
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"data.cache_dir: {folder}: cannot be made ({error.strerror})") from error

    def open(self, url: str, entry: ShardEntry) -> FileIO:
        """A shard, fetched if it is missing, and kept until it is closed. Raises CacheFull and UserError."""
        while True:
            if file := self._open_existing(entry.sha256):
                return file
            self._fetch_once(url, entry)

    def _open_existing(self, name: str) -> FileIO | None:
        try:
            file = (self.folder / name).open("rb", buffering=0)
        except FileNotFoundError:
            return None
        fcntl.flock(file, fcntl.LOCK_SH)
        if os.fstat(file.fileno()).st_nlink:  # not evicted between open and flock
            os.utime(file.fileno())
            return file
        file.close()
        return None

    def _fetch_once(self, url: str, entry: ShardEntry) -> None:
        """Fetch a shard, unless another process did while this one waited for the lock."""
        path = self.folder / entry.sha256
        partial = path.with_name(path.name + PARTIAL)
        try:
            with self._locked(f"lock-{path.name[:2]}"):
                if path.exists():
                    return
                try:
                    with self._reserve(partial, entry.num_bytes) as file:
                        fetch(url, file, entry.num_bytes, entry.sha256)
                        file.flush()
                        partial.rename(path)
                finally:
                    partial.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(
                f"data.cache_dir: {path}: cannot be written ({error.strerror or error}); free space, lower "
                "data.cache_bytes or choose another folder"
            ) from error

    def _reserve(self, partial: Path, size: int) -> BinaryIO:
        """An empty file that has its space at once, under an exclusive lock."""
        with self._locked("lock"):
            self._make_room(size)
            file = partial.open("wb")
            fcntl.flock(file, fcntl.LOCK_EX)
            os.posix_fallocate(file.fileno(), 0, max(size, 1))
        return file

    def _make_room(self, size: int) -> None:
        files = []
        for path in self.folder.iterdir():
            if not path.name.startswith((".", "lock")) and not path.name.endswith(INDEX):
                with suppress(FileNotFoundError):
                    status = path.stat()
                    files.append((status.st_mtime_ns, status.st_size, path))
        total = sum(num_bytes for _, num_bytes, _ in files)
        for _, num_bytes, path in sorted(files):
            if total + size <= self.max_bytes:
                return
            if _remove_unused(path):
                total -= num_bytes
        if total + size > self.max_bytes:
            raise CacheFull(
                f"data.cache_bytes {self.max_bytes}: {total} bytes of {self.folder} are in use and the next "
                f"shard takes {size}; raise it, or make smaller shards"
            )

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        with (self.folder / name).open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


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
