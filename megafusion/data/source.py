"""A folder of shards as M runs of documents, one a logical stream, each shuffled anew every epoch."""

from collections import OrderedDict

import numpy as np

from megafusion.data.cache import ShardCache
from megafusion.data.config import DataConfig
from megafusion.data.document_format import BadDocument, StoredDocument, segment_kind
from megafusion.data.reader import ShardFolder
from megafusion.data.remote import is_remote
from megafusion.errors import UserError
from megafusion.sequence.packing import SequenceShape
from megafusion.sequence.tokenizer import Tokenizer

# What a generator is for: the last of its counters. Shard number n of a stream has SHARDS + n.
DOCUMENT, SHARD_ORDER, PHASE, SHARDS = range(4)


class Source:
    """A folder of shards cut into M runs of documents, one a stream, each shuffled anew every epoch.

    A stream's epoch is its shards in a random order, and within each its documents in a random order, which
    is drawn when the stream comes to that shard: so any place is reached at once, however many there are.
    """

    def __init__(self, name: str, number: int, folder: ShardFolder, num_streams: int, seed: int):
        if len(folder) < num_streams:
            raise UserError(
                f"data.sources.{name}: {folder.folder} holds {len(folder)} documents, fewer than "
                f"data.num_streams {num_streams}; lower num_streams, and with it train.global_batch_size, "
                "which must divide it"
            )
        self.name, self.number, self.folder, self.seed = name, number, folder, seed
        self.num_streams = num_streams
        self._first = np.cumsum([0] + [shard.num_documents for shard in folder.manifest.shards])
        self._shards: OrderedDict[tuple, tuple] = OrderedDict()
        self._documents: OrderedDict[tuple, np.ndarray] = OrderedDict()

    def size(self, stream: int) -> int:
        """Documents of one stream."""
        first, last = self._bounds(stream)
        return last - first

    def document_at(self, stream: int, epoch: int, order: int) -> int:
        """Number, in the whole source, of the document that stands at a place in a stream's epoch."""
        firsts, starts, pieces = self._kept(self._shards, (stream, epoch), self._order_shards)
        turn = int(np.searchsorted(starts, order, side="right")) - 1
        piece, size = int(pieces[turn]), int(starts[turn + 1] - starts[turn])
        key = (stream, epoch, piece, size)
        within = self._kept(self._documents, key, self._order_documents)
        return int(firsts[piece]) + int(within[order - starts[turn]])

    def read(self, document: int) -> StoredDocument:
        """A document by its number; errors as ShardFolder's."""
        shard = int(np.searchsorted(self._first, document, side="right")) - 1
        return self.folder.read(shard, document - int(self._first[shard]))

    def positions_per_document(self, shape: SequenceShape) -> float:
        """Mean length of a document; of pictures that are kept, as though each had the first size."""
        manifest = self.folder.manifest
        counts = manifest.count_by_size or {shape.sizes[0]: manifest.num_images}
        patches = sum(n * shape.patches[shape.sizes.index(size)] for size, n in counts.items() if n)
        return 2 + (manifest.num_tokens + patches + 2 * manifest.num_images) / len(self.folder)

    def check(self, stored: StoredDocument, where: str) -> None:
        """Raises BadDocument where a document's segments are not those of the source's kind."""
        kinds = [segment_kind(segment) for segment in stored.segments]
        manifest = self.folder.manifest
        image = "moments" if manifest.images == "latents" else "picture"
        known = {
            "pair": kinds == ["tokens", image],
            "text": set(kinds) == {"tokens"},
            "interleaved": bool(kinds) and set(kinds) <= {"tokens", image},
        }
        if not known[manifest.kind]:
            raise BadDocument(where, f"no document of kind {manifest.kind} with {manifest.images}")

    def _bounds(self, stream: int) -> tuple[int, int]:
        total = len(self.folder)
        return total * stream // self.num_streams, total * (stream + 1) // self.num_streams

    def _order_shards(self, stream: int, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where each piece of a shard starts; where each turn starts in the epoch; whose turn it is."""
        first, last = self._bounds(stream)
        cuts = np.unique(np.clip(self._first, first, last))
        pieces = counter_generator(self.seed, self.number, stream, epoch, SHARD_ORDER).permutation(
            len(cuts) - 1
        )
        return cuts[:-1], np.cumsum([0, *np.diff(cuts)[pieces]]), pieces

    def _order_documents(self, stream: int, epoch: int, piece: int, size: int) -> np.ndarray:
        generator = counter_generator(self.seed, self.number, stream, epoch, SHARDS + piece)
        return generator.permutation(size).astype(np.uint32)

    def _kept(self, kept: OrderedDict, key: tuple, make):
        """A value made from its key, and remembered among the last ones used: some for each stream."""
        if key not in kept:
            kept[key] = make(*key)
            if len(kept) > 2 * self.num_streams + 8:
                kept.popitem(last=False)
        kept.move_to_end(key)
        return kept[key]


def counter_generator(seed: int, *counter: int) -> np.random.Generator:
    """A generator that depends on nothing but the seed, a source's number, two counters and a purpose."""
    source, *rest = counter
    return np.random.Generator(np.random.Philox(key=[seed, source], counter=[0, *rest]))


def open_sources(config: DataConfig, tokenizer: Tokenizer, vae_sha256: str, seed: int) -> dict[str, Source]:
    """Open every source, refusing shards that another tokenizer or autoencoder made."""
    sources = {}
    for number, name in enumerate(config.sources):
        folder = open_folder(config, name)
        _check_origin(
            f"data.sources.{name}", folder, "tokenizer", folder.manifest.tokenizer_sha256, tokenizer.hash
        )
        if folder.manifest.num_images and folder.manifest.images == "latents":
            _check_origin(f"data.sources.{name}", folder, "vae", folder.manifest.vae_sha256, vae_sha256)
        sources[name] = Source(name, number, folder, config.num_streams, seed)
    return sources


def open_folder(config: DataConfig, name: str) -> ShardFolder:
    """A source's shards, with a cache where they lie on a server."""
    path = config.sources[name].path
    return ShardFolder(path, ShardCache(config.cache_dir, config.cache_bytes) if is_remote(path) else None)


def _check_origin(key: str, folder: ShardFolder, what: str, made_with: str | None, given: str) -> None:
    if made_with != given:
        raise UserError(
            f"{key}: {folder.folder} was made with a {what} of hash {str(made_with)[:12]}, but data.{what} "
            f"has {given[:12]}; preprocess again with it, or give the one that made the shards"
        )
