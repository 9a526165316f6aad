"""Shards: webdataset tars of documents, an index of offsets each, and one manifest a folder; written here.

A document is a tar member `KEY.json` (its kind and metadata) followed by its segments in order:
`KEY.0.tokens.npy` int32 [L] for a text, `KEY.1.moments.npy` float16 [2, C, H, W] for the mean and
log-variance of an image's latents, or `KEY.1.picture.webp` where the picture itself is kept. The index
`shard-000000.index.npy` holds int64 [n + 1] offsets, so any document is one read away and no archive is
ever scanned.
"""

import io
import json
import mmap
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field
from webdataset import TarWriter

from megafusion.config import Config, parse_config
from megafusion.data.document_format import BLOCK, PICTURE, StoredDocument, segment_kind, tar_members
from megafusion.data.remote import is_remote, read_remote
from megafusion.errors import UserError
from megafusion.images.sizes import Size, format_sizes
from megafusion.storage import file_sha256, new_folder, write_file

MANIFEST = "manifest.json"
Kind = Literal["pair", "text", "interleaved"]
FOLDERS: dict[Kind, str] = {"pair": "pairs", "text": "text", "interleaved": "interleaved"}
"""Where preprocessing puts each kind."""


class ShardEntry(Config):
    """One shard of a folder."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\.tar$")
    """File name of the tar; never a path."""
    num_documents: int
    """Documents in it."""
    num_bytes: int
    """Size of the tar; another size on disk means a truncated or altered file."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Hash of the tar."""


class ShardSummary(Config):
    """What a manifest must know of one shard; its counts are named as the manifest's."""

    entry: ShardEntry
    num_tokens: int
    num_images: int
    max_images: int
    max_tokens_beside_images: int
    images_by_size: dict[str, int] = Field({})


class Manifest(Config):
    """What a folder of shards holds, and what it was made with."""

    format: Literal["megafusion-shards/1"] = "megafusion-shards/1"
    """Version of the layout."""
    kind: Kind
    """pair: one text and one image a document, in either order; text: texts only; interleaved: any texts and
    images, in the order in which they are shown."""
    num_tokens: int
    """Text tokens, without bos, eos, boi and eoi."""
    num_images: int
    """Images."""
    max_images: int = 0
    """Most images of a document."""
    max_tokens_beside_images: int = 0
    """Most text tokens of a document with images, which is never split: it must fit in a row."""
    images: Literal["latents", "pictures"] = "latents"
    """latents: made once, by the autoencoder of vae_sha256; pictures: encoded whenever they are shown."""
    tokenizer_sha256: str
    """Hash of the SentencePiece model that made the tokens."""
    vae_sha256: str | None = None
    """Hash of the autoencoder that made the latents; null without latents."""
    latent_shape: tuple[int, int, int] | None = None
    """Channels, height and width of the latents; null without latents."""
    more_sizes: tuple[Size, ...] = ()
    """Further heights and widths that latents may have."""
    images_by_size: dict[str, int] = Field({})
    """Images by height and width of their latents, as 32x32, where there are several; see count_by_size."""
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

    @property
    def latent_shapes(self) -> tuple[tuple[int, int, int], ...]:
        """Every shape that the latents of an image may have; empty without latents."""
        if self.latent_shape is None:
            return ()
        return (self.latent_shape, *((self.latent_shape[0], *size) for size in self.more_sizes))

    @property
    def count_by_size(self) -> dict[Size, int]:
        """Images by height and width of their latents; of sizes that it has no images of, 0."""
        sizes = [shape[1:] for shape in self.latent_shapes]
        if len(sizes) == 1:
            return {sizes[0]: self.num_images}
        return {size: self.images_by_size.get(format_sizes([size]), 0) for size in sizes}


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
    documents, summaries = iter(documents), []
    while batch := list(islice(documents, per_shard)):
        summaries.append(write_shard(folder, len(summaries), batch))
    return write_manifest(folder, summaries, manifest)


def write_manifest(folder: Path, summaries: Sequence[ShardSummary], fields: dict) -> Manifest:
    """Write the manifest of a folder's shards; `fields` are those that the documents do not tell."""
    made = Manifest(
        num_tokens=sum(shard.num_tokens for shard in summaries),
        num_images=sum(shard.num_images for shard in summaries),
        max_images=max((shard.max_images for shard in summaries), default=0),
        max_tokens_beside_images=max((shard.max_tokens_beside_images for shard in summaries), default=0),
        images_by_size=dict(sorted(sum((Counter(s.images_by_size) for s in summaries), Counter()).items())),
        shards=tuple(shard.entry for shard in summaries),
        **fields,
    )
    # Where they say nothing they are not there, so that manifests of one size stay what they were.
    unused = set() if made.more_sizes else {"more_sizes", "images_by_size"}
    write_file(folder / MANIFEST, made.model_dump_json(indent=1, exclude=unused) + "\n")
    return made


def write_shard(folder: Path, number: int, documents: list[StoredDocument]) -> ShardSummary:
    """Write one shard with its index, and say what it holds. Equal documents make equal bytes."""
    path = folder / f"shard-{number:06d}.tar"
    with path.open("wb") as file:
        writer = TarWriter(file, encoder=False, mtime=0)
        for position, document in enumerate(documents):
            members = {"json": json.dumps(document.metadata, sort_keys=True).encode()}
            for order, segment in enumerate(document.segments):
                kind = segment_kind(segment)
                if kind == "picture":
                    members[f"{order}.{PICTURE}"] = segment
                else:
                    members[f"{order}.{kind}.npy"] = npy(segment)
            writer.write({"__key__": f"{number:06d}-{position:06d}", **members})
        writer.close()
    np.save(path.with_suffix(".index.npy"), document_offsets(path))
    tokens = [sum(len(s) for s in document.segments if segment_kind(s) == "tokens") for document in documents]
    images = [sum(segment_kind(s) != "tokens" for s in document.segments) for document in documents]
    by_size = Counter(
        format_sizes([segment.shape[2:]])
        for document in documents
        for segment in document.segments
        if segment_kind(segment) == "moments"
    )
    return ShardSummary(
        entry=ShardEntry(
            name=path.name,
            num_documents=len(documents),
            num_bytes=path.stat().st_size,
            sha256=file_sha256(path),
        ),
        num_tokens=sum(tokens),
        num_images=sum(images),
        max_images=max(images, default=0),
        max_tokens_beside_images=max((t for t, i in zip(tokens, images, strict=True) if i), default=0),
        images_by_size=dict(sorted(by_size.items())),
    )


def document_offsets(path: Path) -> np.ndarray:
    """int64 [n + 1]: where each document's first member starts, and where the last one's last member ends.

    Raises BadBytes where the file is no tar of plain files. Reads the headers alone.
    """
    offsets, previous, end = [], None, 0
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for member in tar_members(content, len(content)):
            key = member.name.partition(".")[0]
            if key != previous:
                offsets.append(member.header)
                previous = key
            end = member.start + -(-member.size // BLOCK) * BLOCK
    return np.array([*offsets, end], np.int64)


def npy(array: np.ndarray) -> bytes:
    """The bytes of an npy file."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def load_manifest(folder: Path | str) -> Manifest:
    """The manifest of a folder of shards, or of a URL. Raises UserError when there is none."""
    if is_remote(folder):
        return _parse_manifest(read_remote(f"{folder}/{MANIFEST}"), f"{folder}/{MANIFEST}")
    folder = Path(folder)
    path = folder / MANIFEST
    if not path.is_file():
        inside = [str(folder / kind) for kind in FOLDERS.values() if (folder / kind / MANIFEST).is_file()]
        way_out = f"name {' or '.join(inside)}" if inside else "make it with `megafusion preprocess`"
        raise UserError(f"{folder}: no {MANIFEST}, so no folder of shards; {way_out}")
    return _parse_manifest(path.read_bytes(), str(path))


def _parse_manifest(content: bytes, where: str) -> Manifest:
    try:
        values = json.loads(content)
    except ValueError as error:
        raise UserError(f"{where}: not readable as JSON ({error}); preprocess again") from error
    return parse_config(Manifest, values, where)
