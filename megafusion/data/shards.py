"""Shards: webdataset tars of documents, each with an index of offsets.

A document is a tar member `KEY.json` (its metadata) followed by its segments in order: `KEY.0.tokens.npy`
int32 [L] for a text, `KEY.1.moments.npy` float16 [2, C, H, W] for the mean and log-variance of an image's
latents, `KEY.1.codes.npy` int32 [H, W] for its codes, or `KEY.1.picture.webp` for its pixels. The index
`shard-000000.index.npy`, int64 [n + 1], says where each document starts and the last one ends, so any is one
read away and no archive is ever scanned.
"""

import io
import json
import mmap
from collections import Counter
from pathlib import Path

import numpy as np

from megafusion.data.document_format import BLOCK, MEMBER_ENDINGS, StoredDocument, tar_members
from megafusion.data.manifest import ShardEntry, ShardSummary
from megafusion.errors import UserError
from megafusion.images.sizes import format_sizes
from megafusion.storage import file_sha256

INDEX = ".index.npy"


def write_shard(folder: Path, number: int, documents: list[StoredDocument]) -> ShardSummary:
    """Write one shard with its index, and summarize it. Equal documents give equal bytes."""
    from webdataset import TarWriter  # a run reads shards without it

    path = folder / f"shard-{number:06d}.tar"
    with path.open("wb") as file, TarWriter(file, encoder=False, mtime=0) as writer:
        for position, document in enumerate(documents):
            members = {"json": json.dumps(document.metadata, sort_keys=True).encode()}
            for order, segment in enumerate(document.segments):
                content = segment.data if segment.kind == "pixels" else npy(segment.data)
                members[f"{order}.{MEMBER_ENDINGS[segment.kind]}"] = content
            writer.write({"__key__": f"{number:06d}-{position:06d}", **members})
    np.save(path.with_suffix(INDEX), document_offsets(path))
    tokens = [sum(len(s.data) for s in d.segments if s.kind == "tokens") for d in documents]
    images = [sum(s.kind != "tokens" for s in d.segments) for d in documents]
    encoded = (s.data for d in documents for s in d.segments if s.kind in ("moments", "codes"))
    by_size = Counter(format_sizes([each.shape[-2:]]) for each in encoded)
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
    """The index of a shard, from its headers. Raises CorruptBytes if it is not a tar of plain files."""
    offsets, previous, end = [], None, 0
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for member in tar_members(content):
            key = member.name.partition(".")[0]
            if key != previous:
                offsets.append(member.header)
                previous = key
            end = member.start + -(-member.size // BLOCK) * BLOCK
    return np.array([*offsets, end], np.int64)


def load_index(index: Path, entry: ShardEntry, shard: Path | str) -> np.ndarray:
    """A shard's index, memory-mapped. Raises UserError if it is not the index of that shard."""
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
        raise UserError(f"{index}: is not the index of {shard}; preprocess again")
    return offsets


def npy(array: np.ndarray) -> bytes:
    """The bytes of an npy file."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()
