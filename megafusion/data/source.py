"""A folder of shards as M ranges of documents, one for each logical stream, reshuffled every epoch."""

import re
from functools import lru_cache

import numpy as np

from megafusion.data.cache import ShardCache
from megafusion.data.config import DataConfig
from megafusion.data.document_format import GIVEN, BadDocument, StoredDocument
from megafusion.data.reader import ShardFolder
from megafusion.data.remote import is_remote
from megafusion.errors import UserError
from megafusion.sequence.packing import SequenceShape
from megafusion.sequence.tokenizer import Tokenizer

# Purpose of a generator: the last of its counters. Shard range n of a stream has SHARDS + n.
DOCUMENT, SHARD_ORDER, PHASE, SHARDS = range(4)

ShardOrder = tuple[np.ndarray, np.ndarray, np.ndarray]
"""A stream's range of each shard: their bounds, the epoch's permutation, starts in its order."""


class Source:
    """A folder of shards split into M ranges of documents, one a stream, reshuffled every epoch.

    A stream's epoch is its shards in random order, and within each its documents in random order. The order
    within a shard is sampled when the stream comes to it, so resuming costs the same anywhere in the data.
    """

    def __init__(
        self,
        name: str,
        number: int,
        folder: ShardFolder,
        num_streams: int,
        seed: int,
        key: str | None = None,
    ):
        self.key = key or f"data.sources.{name}"
        if len(folder) < num_streams:
            raise UserError(
                f"{self.key}: {folder.folder} holds {len(folder)} documents, fewer than {num_streams} "
                "logical streams; lower data.num_streams, and with it train.global_batch_size, which must "
                "divide it"
            )
        self.name, self.number, self.folder, self.seed = name, number, folder, seed
        self.num_streams = num_streams
        self._orders: dict[int, tuple[int, ShardOrder]] = {}
        """Of each stream, the epoch asked for last and its order."""

    def size(self, stream: int) -> int:
        """Documents of one stream."""
        start, end = self._bounds(stream)
        return end - start

    def document_at(self, stream: int, epoch: int, order: int) -> int:
        """Index in the whole source of the document at an index of a stream's epoch."""
        bounds, permutation, starts = self._order_shards(stream, epoch)
        turn = int(np.searchsorted(starts, order, side="right")) - 1
        number, size = int(permutation[turn]), int(starts[turn + 1] - starts[turn])
        documents = _permutation(size, self.seed, self.number, stream, epoch, SHARDS + number)
        return int(bounds[number]) + int(documents[order - starts[turn]])

    def positions_per_document(self, shape: SequenceShape) -> float:
        """Mean length of a document; images kept as pixels count as if all had the first size."""
        manifest = self.folder.manifest
        counts = manifest.count_by_size or {shape.sizes[0]: manifest.num_images}
        patches = sum(n * shape.patches[shape.sizes.index(size)] for size, n in counts.items() if n)
        patches *= 2 if shape.clean_context else 1
        return 2 + (manifest.num_tokens + patches + 2 * manifest.num_images) / len(self.folder)

    def check(self, stored: StoredDocument, where: str) -> None:
        """Raises BadDocument if a document's segments do not have the source's kinds."""
        kinds = [segment.kind for segment in stored.segments]
        manifest = self.folder.manifest
        is_valid = {
            "pair": kinds == ["tokens", manifest.image_kind],
            "text": set(kinds) == {"tokens"},
            "interleaved": bool(kinds) and set(kinds) <= {"tokens", manifest.image_kind},
        }
        if not is_valid[manifest.kind]:
            raise BadDocument(where, f"not a document of kind {manifest.kind} with {manifest.image_kind}")
        given, images = stored.metadata.get(GIVEN, []), range(len(kinds) - kinds.count("tokens"))
        if not isinstance(given, list) or not all(type(index) is int and index in images for index in given):
            raise BadDocument(where, f"{GIVEN!r} is not a list of indices of its images")

    def _bounds(self, stream: int) -> tuple[int, int]:
        total = len(self.folder)
        return total * stream // self.num_streams, total * (stream + 1) // self.num_streams

    def _order_shards(self, stream: int, epoch: int) -> ShardOrder:
        known = self._orders.get(stream)
        if known and known[0] == epoch:
            return known[1]
        bounds = np.unique(np.clip(self.folder.starts, *self._bounds(stream)))
        permutation = _permutation(len(bounds) - 1, self.seed, self.number, stream, epoch, SHARD_ORDER)
        order = bounds, permutation, np.cumsum([0, *np.diff(bounds)[permutation]])
        self._orders[stream] = epoch, order
        return order


@lru_cache(1024)
def _permutation(size: int, *key: int) -> np.ndarray:
    """A random order. Cached, because a stream asks for the same few again and again."""
    return counter_generator(*key).permutation(size).astype(np.uint32)


def counter_generator(seed: int, *counter: int) -> np.random.Generator:
    """A generator that depends only on the seed, a source's number, two counters and a purpose."""
    source, *rest = counter
    return np.random.Generator(np.random.Philox(key=[seed, source], counter=[0, *rest]))


def open_sources(
    config: DataConfig,
    tokenizer: Tokenizer,
    vae_sha256: str,
    seed: int,
    section: str = "data.sources",
    codebook_size: int = 0,
) -> dict[str, Source]:
    """Open every source of a section. codebook_size: of the autoencoder, 0 if its images are latents.

    Raises UserError for shards of another tokenizer or autoencoder.
    """
    sources = {}
    for number, name in enumerate(config.sources):
        folder, key = open_folder(config, name), f"{section}.{name}"
        manifest = folder.manifest
        _check_origin(key, folder, "tokenizer", manifest.tokenizer_sha256, tokenizer.hash)
        if manifest.num_images:
            _check_images(key, folder, codebook_size)
        if manifest.num_images and manifest.image_kind != "pixels":
            _check_origin(key, folder, "vae", manifest.vae_sha256, vae_sha256)
        sources[name] = Source(name, number, folder, config.num_streams, seed, key)
    return sources


def open_folder(config: DataConfig, name: str) -> ShardFolder:
    """A source's shards, with a cache if they are on a server."""
    path = config.sources[name].path
    return ShardFolder(path, ShardCache(config.cache_dir, config.cache_bytes) if is_remote(path) else None)


def _check_images(key: str, folder: ShardFolder, codebook_size: int) -> None:
    """Raise UserError if images are codes and the autoencoder's are latents, or the reverse."""
    kind = folder.manifest.image_kind
    if (kind == "codes") == bool(codebook_size):
        return
    vae = "a VQModel, which makes codes" if codebook_size else "an AutoencoderKL, which makes latents"
    held, made_with = {
        "codes": ("codes", "or set data.vae to the VQModel that made them"),
        "moments": ("latents", "or set data.vae to the AutoencoderKL that made them"),
        "pixels": ("pixels", "with image_storage: latents"),
    }[kind]
    raise UserError(
        f"{key}: {folder.folder} holds images as {held}, but data.vae is {vae}; preprocess again with it, "
        f"{made_with}"
    )


def _check_origin(key: str, folder: ShardFolder, what: str, made_with: str | None, given: str) -> None:
    if made_with != given:
        path = re.search(rf"^{what}: (.+)$", folder.manifest.provenance.get("config", ""), re.MULTILINE)
        raise UserError(
            f"{key}: {folder.folder} was made with a {what} of hash {str(made_with)[:12]}, but data.{what} "
            f"has {given[:12]}; preprocess again with it, or give the one that made the shards"
            + (f" (then {path[1]})" if path else "")
        )
