"""Shards on disk: webdataset tars of documents, an index of offsets each, and one manifest a folder.

A document is a tar member `KEY.json` (its kind and metadata) followed by its segments in order:
`KEY.0.tokens.npy` int32 [L] for a text, `KEY.1.moments.npy` float16 [2, C, H, W] for the mean and
log-variance of an image's latents. The index `shard-000000.index.npy` holds int64 [n + 1] offsets, so
any document is one read away and no archive is ever scanned.
"""

import io
import json
import os
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from webdataset import TarWriter

from megafusion.config import Config, parse_config
from megafusion.errors import UserError
from megafusion.storage import file_sha256, new_folder

MANIFEST = "manifest.json"
Kind = Literal["pair", "text"]


class ShardEntry(Config):
    """One shard of a folder."""

    name: str
    """File name of the tar."""
    num_documents: int
    """Documents in it."""
    num_bytes: int
    """Size of the tar; another size on disk means a truncated or altered file."""
    sha256: str
    """Hash of the tar."""


class Manifest(Config):
    """What a folder of shards holds, and what it was made with."""

    format: Literal["megafusion-shards/1"] = "megafusion-shards/1"
    """Version of the layout."""
    kind: Kind
    """pair: one text and one image a document, in either order; text: texts only."""
    num_tokens: int
    """Text tokens, without bos, eos, boi and eoi."""
    num_images: int
    """Images."""
    max_images: int = 0
    """Most images of a document."""
    max_tokens_beside_images: int = 0
    """Most text tokens of a document with images, which is never split: it must fit in a row."""
    tokenizer_sha256: str
    """Hash of the SentencePiece model that made the tokens."""
    vae_sha256: str | None = None
    """Hash of the autoencoder that made the latents; null without images."""
    latent_shape: tuple[int, int, int] | None = None
    """Channels, height and width of the latents; null without images."""
    latent_scale: float = 1.0
    """Factor that brings latents to unit deviation: the autoencoder's scaling_factor."""
    latent_shift: float = 0.0
    """Subtracted before scaling: the autoencoder's shift_factor."""
    provenance: dict[str, str]
    """Inputs and versions, for people."""
    shards: tuple[ShardEntry, ...]
    """The tars, in order."""

    @property
    def num_documents(self) -> int:
        return sum(shard.num_documents for shard in self.shards)


@dataclass(frozen=True)
class StoredDocument:
    """A document as stored: metadata, and segments in order (int32 [L] or float16 [2, C, H, W])."""

    metadata: dict
    segments: tuple[np.ndarray, ...]


def write_shards(
    folder: Path,
    documents: Iterable[StoredDocument],
    documents_per_shard: int,
    **manifest: object,
) -> Manifest:
    """Write a folder of shards that appears whole or not at all; an older folder of that name goes.

    `manifest` gives the fields that the documents themselves do not tell. Deterministic: equal
    documents make equal bytes. Raises UserError naming the folder when there is no document, when the
    disk is full, and when the folder holds anything but shards.
    """
    with new_folder(folder, MANIFEST) as partial:
        made = _write_all(partial, documents, documents_per_shard, manifest)
        if not made.shards:
            raise UserError(f"{folder}: the inputs hold no document that can be used; nothing is written")
    return made


def _write_all(folder: Path, documents: Iterable[StoredDocument], per_shard: int, manifest: dict) -> Manifest:
    entries, batch = [], []
    num_tokens = num_images = max_images = max_tokens = 0
    for document in documents:
        batch.append(document)
        tokens = sum(len(s) for s in document.segments if s.ndim == 1)
        images = sum(s.ndim == 4 for s in document.segments)
        num_tokens, num_images = num_tokens + tokens, num_images + images
        max_images = max(max_images, images)
        max_tokens = max(max_tokens, tokens if images else 0)
        if len(batch) == per_shard:
            entries.append(_write_shard(folder, len(entries), batch))
            batch = []
    if batch:
        entries.append(_write_shard(folder, len(entries), batch))
    made = Manifest(
        num_tokens=num_tokens,
        num_images=num_images,
        max_images=max_images,
        max_tokens_beside_images=max_tokens,
        shards=tuple(entries),
        **manifest,
    )
    (folder / MANIFEST).write_text(made.model_dump_json(indent=1) + "\n")
    return made


def _write_shard(folder: Path, number: int, documents: list[StoredDocument]) -> ShardEntry:
    path = folder / f"shard-{number:06d}.tar"
    with path.open("wb") as file:
        writer = TarWriter(file, encoder=False, mtime=0)
        for position, document in enumerate(documents):
            members = {"json": json.dumps(document.metadata, sort_keys=True).encode()}
            for order, segment in enumerate(document.segments):
                name = "tokens" if segment.ndim == 1 else "moments"
                members[f"{order}.{name}.npy"] = _npy(segment)
            writer.write({"__key__": f"{number:06d}-{position:06d}", **members})
        writer.close()
    np.save(path.with_suffix(".index.npy"), document_offsets(path))
    return ShardEntry(
        name=path.name,
        num_documents=len(documents),
        num_bytes=path.stat().st_size,
        sha256=file_sha256(path),
    )


def document_offsets(path: Path) -> np.ndarray:
    """Where each document's first member starts, and where the last one's last member ends."""
    offsets, previous, end = [], None, 0
    with tarfile.open(path, "r:") as archive:
        for member in archive:
            key = member.name.partition(".")[0]
            if key != previous:
                offsets.append(member.offset)
                previous = key
            end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    return np.array([*offsets, end], np.int64)


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def load_manifest(folder: Path) -> Manifest:
    """The manifest of a folder of shards. Raises UserError when there is none."""
    path = folder / MANIFEST
    if not path.is_file():
        inside = [str(folder / kind) for kind in ("pairs", "text") if (folder / kind / MANIFEST).is_file()]
        way_out = f"name {' or '.join(inside)}" if inside else "make it with `megafusion preprocess`"
        raise UserError(f"{folder}: no {MANIFEST}, so no folder of shards; {way_out}")
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: not readable as JSON ({error}); preprocess again") from error
    return parse_config(Manifest, values, str(path))


class ShardFolder:
    """Random access to the documents of a folder of shards, each by (shard, position in it)."""

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        self.manifest = load_manifest(self.folder)
        self._files: dict[int, int] = {}
        self._offsets = [self._check(entry) for entry in self.manifest.shards]

    def __len__(self) -> int:
        return self.manifest.num_documents

    def read(self, shard: int, position: int) -> StoredDocument:
        """One document. Raises UserError naming the shard and the member when its bytes are bad."""
        if shard not in self._files:
            path = self.folder / self.manifest.shards[shard].name
            self._files[shard] = os.open(path, os.O_RDONLY)
        first, last = self._offsets[shard][position : position + 2]
        content = os.pread(self._files[shard], int(last - first), int(first))
        where = f"{self.folder / self.manifest.shards[shard].name}, document {position}"
        try:
            return self._parse(content, where)
        except (tarfile.TarError, ValueError, KeyError, EOFError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{where}: not readable ({error}); preprocess again") from error

    def is_intact(self) -> bool:
        """Whether every shard still has the hash that the manifest gives it; reads all of them."""
        return all(file_sha256(self.folder / entry.name) == entry.sha256 for entry in self.manifest.shards)

    def _check(self, entry: ShardEntry) -> np.ndarray:
        """The offsets of a shard that is there whole, as far as a look without reading it can tell."""
        path = self.folder / entry.name
        if not path.is_file():
            raise UserError(f"{path}: shard named in {MANIFEST} is missing; copy it back or preprocess again")
        if path.stat().st_size != entry.num_bytes:
            raise UserError(
                f"{path}: {path.stat().st_size} bytes where {MANIFEST} says {entry.num_bytes}: truncated or "
                "altered; copy it again or preprocess again"
            )
        index = path.with_suffix(".index.npy")
        try:
            offsets = np.load(index, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{index}: not a readable index ({error}); preprocess again") from error
        if (
            offsets.dtype != np.int64
            or offsets.shape != (entry.num_documents + 1,)
            or offsets[0] != 0
            or offsets[-1] > entry.num_bytes
            or (np.diff(offsets) <= 0).any()
        ):
            raise UserError(f"{index}: is not the index of {path.name}; preprocess again")
        return offsets

    def _parse(self, content: bytes, where: str) -> StoredDocument:
        metadata, segments = None, []
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as archive:
            for member in archive:
                data = archive.extractfile(member).read()
                if member.name.endswith(".json"):
                    metadata = json.loads(data)
                else:
                    segments.append(np.load(io.BytesIO(data), allow_pickle=False))
                    if member.name.endswith("moments.npy"):
                        self._check_moments(segments[-1], f"{where}, {member.name}")
        if metadata is None:
            raise UserError(f"{where}: has no .json member; preprocess again")
        return StoredDocument(metadata, tuple(segments))

    def _check_moments(self, moments: np.ndarray, where: str) -> None:
        expected = (2, *(self.manifest.latent_shape or ()))
        if moments.shape != expected:
            raise UserError(f"{where}: moments of shape {moments.shape} where {MANIFEST} says {expected}")
