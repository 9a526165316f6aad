"""Random access to the documents of a folder of shards, here or on a server."""

import os
from collections import OrderedDict
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megafusion.data.cache import INDEX, CacheFull, ShardCache
from megafusion.data.document_format import BadDocument, CorruptBytes, StoredDocument, parse_document
from megafusion.data.manifest import MANIFEST, ShardEntry, load_manifest
from megafusion.data.remote import fetch, is_remote
from megafusion.data.shards import document_offsets, npy
from megafusion.errors import UserError
from megafusion.storage import file_sha256, write_file

MOST_OPEN = 64


class _OpenShard(NamedTuple):
    file: FileIO
    offsets: np.ndarray


class ShardFolder:
    """Random access to the documents of a folder of shards, each by (shard, position in it).

    cache: where shards of a URL are kept; a path needs none. Memory does not grow with what is read.
    """

    def __init__(self, folder: Path | str, cache: ShardCache | None = None):
        self.is_remote = is_remote(folder)
        self.folder = str(folder) if self.is_remote else Path(folder)
        self.manifest = load_manifest(self.folder)
        self._latent_shapes = self.manifest.latent_shapes
        self._cache = cache
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        if not self.is_remote:
            for entry in self.manifest.shards:
                self._check(entry)
        else:
            assert cache, "a URL needs a cache"
            largest = max(entry.num_bytes for entry in self.manifest.shards)
            if largest > cache.max_bytes:
                raise UserError(
                    f"data.cache_bytes {cache.max_bytes}: {self.folder} has a shard of {largest}; raise it"
                )

    def __len__(self) -> int:
        return self.manifest.num_documents

    def __getstate__(self) -> dict:
        """For another process, which opens shards itself."""
        return self.__dict__ | {"_open": OrderedDict()}

    def read(self, shard: int, position: int) -> StoredDocument:
        """One document.

        Raises BadDocument naming the shard when its bytes are bad, and UserError when they are not to be had.
        """
        opened = self._opened(shard)
        where = self._where(shard)
        first, last = map(int, opened.offsets[position : position + 2])
        try:
            content = os.pread(opened.file.fileno(), last - first, first)
        except OSError as error:
            raise UserError(f"{where}: cannot be read ({error.strerror})") from error
        if len(content) != last - first:
            raise UserError(f"{where}: has become shorter while it was read; bring it back and start again")
        try:
            return parse_document(content, self._latent_shapes)
        except CorruptBytes as error:
            raise BadDocument(f"{where}, document {position}", str(error)) from error

    def is_intact(self) -> bool:
        """Whether every shard still has the hash that the manifest gives it; reads all of them."""
        return all(file_sha256(self.folder / entry.name) == entry.sha256 for entry in self.manifest.shards)

    def close(self) -> None:
        """Let go of every shard; reading opens them again."""
        while self._open:
            self._open.popitem()[1].file.close()

    def _where(self, shard: int) -> str:
        return f"{self.folder}/{self.manifest.shards[shard].name}"

    def _check(self, entry: ShardEntry) -> None:
        """UserError where a shard is not there whole, as far as a look without opening it can tell."""
        path = self.folder / entry.name
        try:
            size = path.stat().st_size
        except OSError as error:
            raise UserError(
                f"{path}: shard named in {MANIFEST} is missing; copy it back or preprocess again"
            ) from error
        if size != entry.num_bytes:
            raise UserError(
                f"{path}: {size} bytes where {MANIFEST} says {entry.num_bytes}: truncated or "
                "altered; copy it again or preprocess again"
            )

    def _opened(self, shard: int) -> _OpenShard:
        if shard not in self._open:
            entry = self.manifest.shards[shard]
            self._open[shard] = self._open_remote(entry) if self.is_remote else self._open_local(entry)
            if len(self._open) > MOST_OPEN:
                self._open.popitem(last=False)[1].file.close()
        self._open.move_to_end(shard)
        return self._open[shard]

    def _open_local(self, entry: ShardEntry) -> _OpenShard:
        path = self.folder / entry.name
        self._check(entry)
        return _open_shard(path.open("rb", buffering=0), path, path.with_suffix(INDEX), entry)

    def _open_remote(self, entry: ShardEntry) -> _OpenShard:
        """From the cache. The index is made here of the bytes whose hash was checked."""
        url = f"{self.folder}/{entry.name}"

        def held() -> FileIO:
            return self._cache.open(
                entry.sha256,
                entry.num_bytes,
                lambda into: fetch(url, into, entry.num_bytes, entry.sha256),
            )

        try:
            file = held()
        except CacheFull:
            self.close()  # what this process holds may be what is in the way
            file = held()
        index = self._cache.folder / (entry.sha256 + INDEX)
        if not index.is_file():
            try:
                write_file(index, npy(document_offsets(self._cache.folder / entry.sha256)))
            except CorruptBytes as error:
                file.close()
                raise UserError(f"{url}: no tar of documents ({error}); preprocess again") from error
        return _open_shard(file, url, index, entry)


def _open_shard(file: FileIO, path: Path | str, index: Path, entry: ShardEntry) -> _OpenShard:
    """A shard with its index. Raises UserError, and closes it, where the index is another's."""
    try:
        offsets = np.load(index, mmap_mode="r", allow_pickle=False)
        if (
            offsets.dtype != np.int64
            or offsets.shape != (entry.num_documents + 1,)
            or offsets[0] != 0
            or offsets[-1] > entry.num_bytes
            or (np.diff(offsets) <= 0).any()
        ):
            raise UserError(f"{index}: is not the index of {path}; preprocess again")
    except UserError:
        file.close()
        raise
    except (OSError, ValueError, EOFError) as error:
        file.close()
        raise UserError(f"{index}: not a readable index ({error}); preprocess again") from error
    return _OpenShard(file, offsets)
