"""A folder of shards as M runs of documents, one a logical stream, each shuffled anew every epoch."""

from itertools import pairwise

import numpy as np

from megafusion.data.config import DataConfig
from megafusion.data.shards import ShardFolder, StoredDocument
from megafusion.errors import UserError
from megafusion.sequence.tokenizer import Tokenizer


class Source:
    """A folder of shards cut into M runs of documents, one a stream, each shuffled anew every epoch."""

    def __init__(self, name: str, number: int, folder: ShardFolder, num_streams: int, seed: int):
        if len(folder) < num_streams:
            raise UserError(
                f"data.sources.{name}: {folder.folder} holds {len(folder)} documents, fewer than "
                f"data.num_streams {num_streams}; lower num_streams, and with it train.global_batch_rows, "
                "which must divide it"
            )
        self.name, self.number, self.folder, self.num_streams, self.seed = (
            name,
            number,
            folder,
            num_streams,
            seed,
        )
        self._first = np.cumsum([0] + [shard.num_documents for shard in folder.manifest.shards])
        self._orders: dict[int, tuple[int, np.ndarray]] = {}

    def size(self, stream: int) -> int:
        """Documents of one stream."""
        first, last = self._bounds(stream)
        return last - first

    def document_at(self, stream: int, epoch: int, order: int) -> int:
        """Number, in the whole source, of the document that stands at a place in a stream's epoch."""
        cached_epoch, permutation = self._orders.get(stream, (-1, None))
        if cached_epoch != epoch:
            permutation = self._shuffle(stream, epoch)
            self._orders[stream] = (epoch, permutation)
        return int(permutation[order])

    def read(self, document: int) -> StoredDocument:
        shard = int(np.searchsorted(self._first, document, side="right")) - 1
        return self.folder.read(shard, document - int(self._first[shard]))

    def _bounds(self, stream: int) -> tuple[int, int]:
        total = len(self.folder)
        return total * stream // self.num_streams, total * (stream + 1) // self.num_streams

    def _shuffle(self, stream: int, epoch: int) -> np.ndarray:
        """Shards in a random order, and documents in a random order within each."""
        first, last = self._bounds(stream)
        generator = counter_generator(self.seed, self.number, stream, epoch, 1)
        cuts = np.unique(np.clip(self._first, first, last))
        pieces = [np.arange(a, b) for a, b in pairwise(cuts)]
        return np.concatenate([generator.permutation(pieces[i]) for i in generator.permutation(len(pieces))])


def counter_generator(seed: int, *counter: int) -> np.random.Generator:
    """A generator that depends on nothing but the seed and up to four small counters and a purpose."""
    source, *rest = counter
    return np.random.Generator(np.random.Philox(key=[seed, source], counter=[0, *rest]))


def open_sources(config: DataConfig, tokenizer: Tokenizer, vae_sha256: str, seed: int) -> dict[str, Source]:
    """Open every source, refusing shards that another tokenizer or autoencoder made."""
    sources = {}
    for number, (name, source) in enumerate(config.sources.items()):
        folder = ShardFolder(source.path)
        _check_origin(
            f"data.sources.{name}", folder, "tokenizer", folder.manifest.tokenizer_sha256, tokenizer.hash
        )
        if folder.manifest.num_images:
            _check_origin(f"data.sources.{name}", folder, "vae", folder.manifest.vae_sha256, vae_sha256)
        sources[name] = Source(name, number, folder, config.num_streams, seed)
    return sources


def _check_origin(key: str, folder: ShardFolder, what: str, made_with: str | None, given: str) -> None:
    if made_with != given:
        raise UserError(
            f"{key}: {folder.folder} was made with a {what} of hash {str(made_with)[:12]}, but data.{what} "
            f"has {given[:12]}; preprocess again with it, or give the one that made the shards"
        )
