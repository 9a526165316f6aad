"""Logical streams: an order of packed rows that no rank, worker or restart can change.

The order is defined by M logical streams. Each owns a fixed run of every source's documents, shuffles
it anew each epoch, and packs rows from it; row g of global batch k comes from stream (k B + g) mod M.
All randomness (shuffling, timesteps, noise, the caption-first coin, caption dropout) comes from a
counter-based generator keyed by the seed and the document's place, so that a stream's state is a few
integers: the documents it has not packed yet, and where it reads next.
"""

from copy import deepcopy
from dataclasses import dataclass, field

import numpy as np

from megafusion.data.config import DataConfig
from megafusion.data.shards import StoredDocument
from megafusion.data.source import Source, counter_generator
from megafusion.errors import UserError
from megafusion.sequence.document import FlatDocument, NoisedImage, flatten, split_text
from megafusion.sequence.packing import PackedBatch, RowShape, collate, pack_row
from megafusion.sequence.tokenizer import Tokenizer


@dataclass
class StreamState:
    """Everything a logical stream remembers: small, travels with the batch, saved with the checkpoint."""

    position: dict[str, list[int]]
    """By source: the epoch and the number of its documents read in it."""
    positions_packed: dict[str, int]
    """By source: sequence positions packed so far, which steer the mixture."""
    pending: list[list] = field(default_factory=list)
    """Documents read and not packed yet, oldest first: source, epoch, order in it, piece."""

    def plain(self) -> dict:
        """A copy as plain values, which JSON can hold."""
        return {
            "position": {name: list(place) for name, place in self.position.items()},
            "positions_packed": dict(self.positions_packed),
            "pending": [list(place) for place in self.pending],
        }


class LogicalStream:
    """An endless sequence of packed rows with a state that a checkpoint can hold."""

    def __init__(
        self,
        number: int,
        sources: dict[str, Source],
        config: DataConfig,
        shape: RowShape,
        tokenizer: Tokenizer,
        num_timesteps: int,
    ):
        self.number, self._sources, self._config = number, sources, config
        self._shape, self._tokenizer, self._num_timesteps = shape, tokenizer, num_timesteps
        self.state = StreamState({name: [0, 0] for name in sources}, dict.fromkeys(sources, 0))
        self._documents: dict[tuple, FlatDocument] = {}

    def next_row(self) -> dict[str, np.ndarray]:
        """The next packed row (see `pack_row`); `state` then stands after it."""
        chosen, used_length, used_images = [], 0, 0
        while True:
            while len(self.state.pending) < self._config.look_ahead:
                self._read_next()
            fitting = [
                place
                for place in self.state.pending
                if self._shape.fits(self._flat(place), used_length, used_images)
            ]
            if not fitting:
                return pack_row(chosen, self._shape)
            # The oldest opens the row, so that none waits for ever; then the longest that still fits.
            place = max(fitting, key=lambda p: len(self._flat(p))) if chosen else fitting[0]
            document = self._documents.pop(tuple(place))
            self.state.pending.remove(place)
            chosen.append(document)
            used_length += len(document)
            used_images += len(document.images)
            self.state.positions_packed[place[0]] += len(document)

    def _read_next(self) -> None:
        """Bring one more document into the look-ahead, from the source that lags its weight most."""
        waiting = dict.fromkeys(self._sources, 0)
        for place in self.state.pending:
            waiting[place[0]] += len(self._flat(place))
        name = min(
            self._sources,
            key=lambda n: (self.state.positions_packed[n] + waiting[n]) / self._config.sources[n].weight,
        )
        epoch, order = self.state.position[name]
        for piece, document in enumerate(self._load(name, epoch, order)):
            self.state.pending.append([name, epoch, order, piece])
            self._documents[name, epoch, order, piece] = document
        order += 1
        ended = order == self._sources[name].size(self.number)
        self.state.position[name] = [epoch + 1, 0] if ended else [epoch, order]

    def _flat(self, place: list) -> FlatDocument:
        """A pending document, read again where a restored state names it."""
        key = tuple(place)
        if key not in self._documents:
            name, epoch, order, piece = place
            self._documents[key] = self._load(name, epoch, order)[piece]
        return self._documents[key]

    def _load(self, name: str, epoch: int, order: int) -> list[FlatDocument]:
        source = self._sources[name]
        number = source.document_at(self.number, epoch, order)
        generator = counter_generator(source.seed, source.number, number, epoch, 0)
        stored = source.read(number)
        document = flatten(self._draw(stored, source, generator), self._tokenizer, self._shape.num_patches)
        if not document.images:
            return split_text(document, self._shape.length)
        if not self._shape.fits(document):
            raise UserError(
                f"{source.folder.folder}, document {number} ({stored.metadata.get('caption', '')[:60]!r}): "
                f"{len(document)} positions and {len(document.images)} images do not fit in a row of "
                f"data.sequence_length {self._shape.length} and data.images_per_row "
                f"{self._shape.num_images}; raise them or shorten the caption"
            )
        return [document]

    def _draw(self, stored: StoredDocument, source: Source, generator: np.random.Generator) -> list:
        """Decide everything random about a document: order, dropout, latents, timesteps, noise."""
        segments = list(stored.segments)
        max_timestep = self._num_timesteps
        if source.folder.manifest.kind == "pair":
            text, moments = segments
            if generator.random() >= self._config.caption_first:
                segments = [moments, text]
                max_timestep = min(max_timestep, self._config.image_first_max_timestep)
            elif generator.random() < self._config.caption_dropout:
                segments = [moments]
        manifest = source.folder.manifest
        drawn = []
        for segment in segments:
            if segment.ndim == 1:
                drawn.append(segment)
                continue
            mean, log_variance = segment.astype(np.float32)
            sample = mean + np.exp(0.5 * log_variance) * generator.standard_normal(mean.shape, np.float32)
            drawn.append(
                NoisedImage(
                    latents=(sample - manifest.latent_shift) * manifest.latent_scale,
                    noise=generator.standard_normal(mean.shape, np.float32),
                    timestep=int(generator.integers(max_timestep)),
                )
            )
        return drawn


@dataclass(frozen=True)
class GlobalBatch:
    """This rank's micro-batches of one global batch, and the state to go on from after it."""

    micro_batches: list[PackedBatch]
    state: dict


class BatchStream:
    """This rank's rows of each global batch, from the logical streams that they need.

    num_rows: rows B of a global batch; rows: those of this rank; micro_batch_size: rows at a time.
    """

    def __init__(
        self,
        config: DataConfig,
        sources: dict[str, Source],
        shape: RowShape,
        tokenizer: Tokenizer,
        num_timesteps: int,
        num_rows: int,
        rows: range,
        micro_batch_size: int,
    ):
        if config.num_streams % num_rows:
            raise UserError(
                f"data.num_streams {config.num_streams} is not a multiple of the "
                f"{num_rows} rows of a global batch"
            )
        self._rows, self._num_rows, self._micro_batch_size = rows, num_rows, micro_batch_size
        self._num_streams = config.num_streams
        self._batch_number = 0
        self._streams = {
            number: LogicalStream(number, sources, config, shape, tokenizer, num_timesteps)
            for number in range(config.num_streams)
            if number % num_rows in rows
        }

    def next(self) -> GlobalBatch:
        """The next global batch's rows. Raises UserError naming the document that is bad."""
        first = self._batch_number * self._num_rows
        rows = [self._streams[(first + g) % self._num_streams].next_row() for g in self._rows]
        self._batch_number += 1
        size = self._micro_batch_size
        micro_batches = [collate(rows[i : i + size]) for i in range(0, len(rows), size)]
        return GlobalBatch(micro_batches, self.state())

    def state(self) -> dict:
        """Plain values for a checkpoint: the batch's number and the state of each stream of this rank."""
        streams = {str(number): stream.state.plain() for number, stream in self._streams.items()}
        return {"batch_number": self._batch_number, "streams": streams}

    def restore(self, state: dict) -> None:
        """Go on from a state, which may hold more streams than this rank needs, and must hold its own."""
        self._batch_number = state["batch_number"]
        for number, stream in self._streams.items():
            stream.state = StreamState(**deepcopy(state["streams"][str(number)]))
