"""Synthetic shards, data loaders over them, and hashes of rows."""

import hashlib
import itertools
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from megafusion.data.config import DataConfig
from megafusion.data.document_format import StoredDocument
from megafusion.data.loader import DataLoader
from megafusion.data.manifest import MANIFEST, write_manifest
from megafusion.data.shards import write_shard
from megafusion.data.source import open_sources
from megafusion.objective.ddpm import DDPMConfig
from megafusion.sequence.document import Segment
from megafusion.sequence.packing import PackedBatch, SequenceShape
from megafusion.sequence.tokenizer import Tokenizer
from megafusion.storage import new_folder

IDS = Tokenizer(Path("t"), "t", 62, bos=1, eos=2)
MANY_IDS = Tokenizer(Path("t"), "t", 1 << 30, bos=1, eos=2)
"""With as many tokens as a test likes, so that each may occur only once."""
LATENTS, NUM_PATCHES = (1, 4, 4), 4


def stored(metadata: dict, *segments: np.ndarray | bytes) -> StoredDocument:
    """A document of texts (token ids), images' moments and images' WebP files."""
    return StoredDocument(metadata, tuple(map(_segment, segments)))


def _segment(data: np.ndarray | bytes) -> Segment:
    if isinstance(data, bytes):
        return Segment("pixels", data)
    return Segment("tokens" if data.ndim == 1 else "moments", data)


def write_shards(folder: Path, documents: Iterable[StoredDocument], per_shard: int, **fields: object) -> None:
    """Write a folder of shards, in place of an older one; `fields` are of the manifest."""
    remaining = iter(documents)
    batches = iter(lambda: list(itertools.islice(remaining, per_shard)), [])
    with new_folder(folder, MANIFEST) as partial:
        write_manifest(partial, [write_shard(partial, *batch) for batch in enumerate(batches)], fields)


def write_pairs(folder: Path, num: int, per_shard: int = 16, latents=LATENTS, caption=lambda r: 5) -> Path:
    """Write pairs; `caption` samples the lengths of captions."""
    random = np.random.default_rng(0)

    def documents():
        for i in range(num):
            tokens = random.integers(3, 60, caption(random)).astype(np.int32)
            moments = random.standard_normal((2, *latents)).astype(np.float16)
            yield stored({"key": f"k{i}", "caption": f"image {i}"}, tokens, moments)

    fields = {"kind": "pair", "tokenizer_sha256": "t", "vae_sha256": "v", "latent_shape": latents}
    write_shards(folder, documents(), per_shard, provenance={}, **fields)
    return folder


def write_texts(folder: Path, num: int, per_shard: int = 16, length=lambda r: int(r.integers(1, 90))) -> Path:
    """Write texts; `length` samples their lengths."""
    random = np.random.default_rng(1)

    def documents():
        for i in range(num):
            yield stored({"line": i}, random.integers(3, 60, length(random)).astype(np.int32))

    write_shards(folder, documents(), per_shard, kind="text", tokenizer_sha256="t", provenance={})
    return folder


def write_documents(folder: Path, documents: list[list[int]], per_shard: int = 5, latents=LATENTS) -> Path:
    """Write interleaved documents: a text of so many tokens, or an image for a 0.

    Tokens count up from 100. The latents of the n-th image are n, with almost no deviation.
    """
    token, image = itertools.count(100), itertools.count()

    def segment(length: int) -> np.ndarray:
        if length:
            return np.array(list(itertools.islice(token, length)), np.int32)
        return np.stack([np.full(latents, value, np.float16) for value in (next(image), -30)])

    made = [stored({"key": str(n)}, *map(segment, parts)) for n, parts in enumerate(documents)]
    fields = {"kind": "interleaved", "tokenizer_sha256": "t", "vae_sha256": "v", "latent_shape": latents}
    write_shards(folder, made, per_shard, provenance={}, **fields)
    return folder


def stream_of(
    sources: dict[str, tuple[Path | str, float]],
    rows: range,
    num_rows: int,
    *,
    length: int = 64,
    slots: int = 4,
    num_patches: int = NUM_PATCHES,
    latents: tuple[int, int, int] = LATENTS,
    more_sizes: tuple[tuple[int, int], ...] = (),
    pixels_per_latent: int = 0,
    seed: int = 0,
    micro: int = 1,
    ids: Tokenizer = IDS,
    **changes,
) -> DataLoader:
    """A rank's data loader over folders (or URLs) and weights; `changes` are of DataConfig."""
    values = {
        "sources": {name: {"path": str(path), "weight": weight} for name, (path, weight) in sources.items()},
        "tokenizer": Path("t"),
        "vae": Path("v"),
        "sequence_length": length,
        "images_per_row": slots,
        "num_streams": num_rows,
    }
    config = DataConfig(**values | changes)
    channels, *first = latents
    sizes = (tuple(first), *more_sizes)
    patches = tuple(height * width * num_patches // (first[0] * first[1]) for height, width in sizes)
    shape = SequenceShape(
        length, slots, patches, channels, sizes, pixels_per_latent, clean_context=config.clean_context
    )
    opened = open_sources(config, ids, "v", seed)
    return DataLoader(config, opened, shape, ids, DDPMConfig().build(), num_rows, rows, micro)


def arrays(row: PackedBatch) -> dict[str, np.ndarray]:
    """The fields of a batch of one row as NumPy arrays of that row."""
    return {name: tensor[0].numpy() for name, tensor in vars(row).items() if tensor.ndim}


def document_starts(row: dict[str, np.ndarray]) -> np.ndarray:
    """[S] the first position of each position's document, in a row as `arrays` gives it."""
    own = np.arange(len(row["positions"]))
    return np.maximum.accumulate(np.where(row["positions"] == 0, own, 0))


def digest(micro_batches) -> list[str]:
    """A hash of each row of a global batch."""
    rows = []
    for micro in micro_batches:
        for row in range(len(micro.tokens)):
            whole = hashlib.sha256()
            for name, value in vars(micro).items():
                if value.ndim and name != "target_index":  # of the micro-batch, not of a row
                    whole.update(name.encode() + value[row].numpy().tobytes())
            rows.append(whole.hexdigest())
    return rows


def latents_as_features(batch: PackedBatch) -> Tensor:
    """float32 [B, N, P, F]: the latents of each patch of 2 x 2, in the place of a vision model's features."""
    patches = F.unfold(batch.latents.flatten(0, 1), 2, stride=2).transpose(1, 2)
    return patches.unflatten(0, batch.t.shape)
