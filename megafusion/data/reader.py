"""Random access to the documents of a folder of shards, local or on a server."""

import os
from collections import OrderedDict
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from megafusion.data.cache import CacheFull, ShardCache
from megafusion.data.document_format import BadDocument, CorruptBytes, StoredDocument, parse_document
from megafusion.data.manifest import MANIFEST, ShardEntry, load_manifest
from megafusion.data.remote import is_remote
from megafusion.data.shards import INDEX, document_offsets, load_index, npy
from megafusion.errors import UserError
from megafusion.storage import file_sha256, write_file

MAX_OPEN = 64
OpenShard = tuple[FileIO, np.ndarray]
"""A shard's file and its index."""


class ShardFolder:
    """Random access to the documents of a folder of shards, each by its index in the folder.

    cache: keeps the shards of a URL; a path needs none. Memory does not grow with what is read.
    """

    def __init__(self, folder: Path | str, cache: ShardCache | None = None):
        self.folder: Any = str(folder) if is_remote(folder) else Path(folder)
        """The str of a URL, or a Path."""
        self.manifest = load_manifest(self.folder)
        self.starts = np.cumsum([0] + [entry.num_documents for entry in self.manifest.shards])
        """Index of each shard's first document; last the number of documents."""
        self._cache = cache
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        for entry in self.manifest.shards:
            if not cache:
                self._check_size(entry)
            elif entry.num_bytes > cache.max_bytes:
                raise UserError(
                    f"data.cache_bytes {cache.max_bytes}: {self.folder} has a shard of {entry.num_bytes}; "
                    "raise it"
                )

    def __len__(self) -> int:
        return self.manifest.num_documents

    def __getstate__(self) -> dict:
        """For another process, which opens shards itself."""
        return self.__dict__ | {"_open": OrderedDict()}

    def read(self, document: int) -> StoredDocument:
        """One document. Raises BadDocument if its bytes are bad, and UserError if they cannot be read."""
        shard = int(np.searchsorted(self.starts, document, side="right")) - 1
        position = document - int(self.starts[shard])
        file, offsets = self._opened(shard)
        where = f"{self.folder}/{self.manifest.shards[shard].name}"
        start, end = map(int, offsets[position : position + 2])
        try:
            content = os.pread(file.fileno(), end - start, start)
        except OSError as error:
            raise UserError(f"{where}: cannot be read ({error.strerror})") from error
        if len(content) != end - start:
            raise UserError(f"{where}: became shorter while it was open; restore it and start again")
        try:
            return parse_document(content, self.manifest.latent_shapes, self.manifest.codebook_size)
        except CorruptBytes as error:
            raise BadDocument(f"{where}, document {position}", str(error)) from error

    def is_intact(self) -> bool:
        """Whether every shard still has the manifest's hash; reads all of them."""
        return all(file_sha256(self.folder / entry.name) == entry.sha256 for entry in self.manifest.shards)

    def close(self) -> None:
        """Close every shard; reading opens them again."""
        while self._open:
            self._open.popitem()[1][0].close()

    def _check_size(self, entry: ShardEntry) -> None:
        """Raises UserError if a shard is missing or has another size."""
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

    def _opened(self, shard: int) -> OpenShard:
        if shard not in self._open:
            entry = self.manifest.shards[shard]
            self._open[shard] = self._open_cached(entry) if self._cache else self._open_local(entry)
            if len(self._open) > MAX_OPEN:
                self._open.popitem(last=False)[1][0].close()
        self._open.move_to_end(shard)
        return self._open[shard]

    def _open_local(self, entry: ShardEntry) -> OpenShard:
        path = self.folder / entry.name
        self._check_size(entry)
        offsets = load_index(path.with_suffix(INDEX), entry, path)
        return path.open("rb", buffering=0), offsets

    def _open_cached(self, entry: ShardEntry) -> OpenShard:
        """Open a shard in the cache. Its index is computed here, from the bytes whose hash was checked."""
        url, cache = f"{self.folder}/{entry.name}", self._cache
        assert cache
        try:
            file = cache.open(url, entry)
        except CacheFull:
            self.close()  # the shards that this process holds may fill it
            file = cache.open(url, entry)
        index = cache.folder / (entry.sha256 + INDEX)
        try:
            if not index.is_file():
                write_file(index, npy(document_offsets(cache.folder / entry.sha256)))
            return file, load_index(index, entry, url)
        except CorruptBytes as error:
            file.close()
            raise UserError(f"{url}: not a tar of documents ({error}); preprocess again") from error
        except UserError:
            file.close()
            raise
