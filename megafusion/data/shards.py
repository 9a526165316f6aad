"""Writes shards: webdataset tars of documents, an index of offsets each, and one manifest a folder.

A document is a tar member `KEY.json` (its metadata) followed by its segments in order: `KEY.0.tokens.npy`
int32 [L] for a text, `KEY.1.moments.npy` float16 [2, C, H, W] for the mean and log-variance of an image's
latents, or `KEY.1.picture.webp` for its pixels. The index `shard-000000.index.npy` holds int64 [n + 1]
offsets, so any document is one read away and no archive is ever scanned.
"""

import json
from collections import Counter
from pathlib import Path

import numpy as np
from webdataset import TarWriter

from megafusion.data.document_format import MEMBER_ENDINGS, StoredDocument
from megafusion.data.index import INDEX, document_offsets, npy
from megafusion.data.manifest import ShardEntry, ShardSummary
from megafusion.images.sizes import format_sizes
from megafusion.sequence.document import Segment
from megafusion.storage import file_sha256


def write_shard(folder: Path, number: int, documents: list[StoredDocument]) -> ShardSummary:
    """Write one shard with its index, and summarize it. Equal documents give equal bytes."""
    path = folder / f"shard-{number:06d}.tar"
    with path.open("wb") as file, TarWriter(file, encoder=False, mtime=0) as writer:
        for position, document in enumerate(documents):
            members = {"json": json.dumps(document.metadata, sort_keys=True).encode()}
            for order, segment in enumerate(document.segments):
                content = segment.data if segment.kind == "pixels" else npy(segment.data)
                members[f"{order}.{MEMBER_ENDINGS[segment.kind]}"] = content
            writer.write({"__key__": f"{number:06d}-{position:06d}", **members})
    np.save(path.with_suffix(INDEX), document_offsets(path))
    tokens = [sum(map(_num_tokens, document.segments)) for document in documents]
    images = [sum(segment.kind != "tokens" for segment in document.segments) for document in documents]
    by_size = Counter(
        format_sizes([segment.data.shape[2:]])
        for document in documents
        for segment in document.segments
        if segment.kind == "moments"
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


def _num_tokens(segment: Segment) -> int:
    return len(segment.data) if segment.kind == "tokens" else 0
