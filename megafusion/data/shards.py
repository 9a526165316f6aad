"""Shards: webdataset tars of documents, an index of offsets each, and one manifest a folder.

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
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import numpy as np
from webdataset import TarWriter

from megafusion.data.document_format import BLOCK, PICTURE, StoredDocument, segment_kind, tar_members
from megafusion.data.manifest import MANIFEST, Manifest, ShardEntry, ShardSummary, write_manifest
from megafusion.errors import UserError
from megafusion.images.sizes import format_sizes
from megafusion.storage import file_sha256, new_folder


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
