"""Logical streams: an order of packed rows that no rank, worker or restart can change.

The order is defined by M logical streams. Each owns a fixed run of every source's documents, shuffles
it anew each epoch, and packs rows from it. All randomness (shuffling, t, noise, the caption-first
coin, caption dropout) comes from a counter-based generator keyed by the seed and the document's place, so
that a stream's state is a few integers: the documents it has not packed yet, and where it reads next.
"""

import math
from dataclasses import dataclass, field

import numpy as np

from megafusion.data.config import DataConfig
from megafusion.data.document_format import AFTER_TEXT, BadDocument, CorruptBytes
from megafusion.data.error_budget import beyond_chance
from megafusion.data.sampling import sample_layout, sample_noise
from megafusion.data.source import DOCUMENT, PHASE, Source, counter_generator
from megafusion.errors import UserError
from megafusion.objective.noise_process import NoiseProcess
from megafusion.sequence.document import FlatDocument, cut_document, find_cut, flatten, images_between
from megafusion.sequence.packing import SequenceShape, pack_row
from megafusion.sequence.tokenizer import Tokenizer

PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53)


@dataclass
class StreamState:
    """Everything a logical stream remembers: small, travels with the batch, saved with the checkpoint."""

    position: dict[str, list[int]]
    """By source: the epoch, the number of its documents read in it, the positions read of the next one."""
    positions_packed: dict[str, int]
    """By source: sequence positions packed so far, which steer the mixture."""
    pending: list[list] = field(default_factory=list)
    """Documents and pieces of them read and not packed yet, oldest first: source, epoch, order in it,
    first position, end, images."""
    num_read: int = 0
    """Documents read so far, those left out among them."""
    skipped: dict[str, int] = field(default_factory=dict)
    """By reason: documents left out so far."""

    def plain(self) -> dict:
        """A copy as plain values, which JSON can hold."""
        return {
            "position": {name: list(place) for name, place in self.position.items()},
            "positions_packed": dict(self.positions_packed),
            "pending": [list(place) for place in self.pending],
            "num_read": self.num_read,
            "skipped": dict(self.skipped),
        }


class LogicalStream:
    """An endless sequence of packed rows with a state that a checkpoint can hold."""

    def __init__(
        self,
        number: int,
        sources: dict[str, Source],
        config: DataConfig,
        shape: SequenceShape,
        tokenizer: Tokenizer,
        noise_process: NoiseProcess,
    ):
        self.number, self._sources, self._config = number, sources, config
        self._shape, self._tokenizer, self._noise_process = shape, tokenizer, noise_process
        self.state = StreamState({name: [0, 0, 0] for name in sources}, dict.fromkeys(sources, 0))
        self.warnings: list[str] = []
        """What was left out since somebody looked."""
        self._documents: dict[tuple, tuple[FlatDocument, np.random.Generator | None]] = {}
        self._phase = {name: self._start(source) for name, source in sources.items()}
        # The least that a cut may leave on either side: slivers teach nothing and cost no fill.
        self._least = max(2, shape.length // 64)

    def resume(self, state: dict) -> None:
        """Go on from a state's plain values."""
        self.state = StreamState(**StreamState(**state).plain())
        self._documents.clear()

    def next_row(self) -> dict[str, np.ndarray]:
        """The next packed row (see `pack_row`); `state` then stands after it.

        The oldest opens the row, so that none waits for ever; then comes the longest that still fits; and
        when none fits, a text or an interleaved document is cut to fill the row, its rest keeping its place
        in the queue.
        """
        chosen: list[FlatDocument] = []
        room, slots = self._shape.length, self._shape.num_images
        while True:
            while len(self.state.pending) < self._config.packing_buffer_size:
                self._read_next()
            place = self._choose(room, slots) if chosen else self.state.pending[0]
            if place is None:
                break
            name, _, _, first, last, num_images = place
            end = self._cut(place, room, slots)
            piece = cut_document(self._drawn(place) if num_images else self._whole(place), first, end)
            if end < last:
                place[3], place[5] = end, num_images - len(piece.images)
            else:
                self.state.pending.remove(place)
            chosen.append(piece)
            room -= len(piece)
            slots -= len(piece.images)
            self.state.positions_packed[name] += len(piece)
        self._forget()
        return pack_row(chosen, self._shape)

    def _choose(self, room: int, slots: int) -> list | None:
        """What comes next in a row: of the source that is due, the longest that fits, or one to be cut."""
        best: dict[str, tuple[bool, int, list]] = {}
        for place in self.state.pending:
            name, _, _, first, last, num_images = place
            length = last - first
            fits = length <= room and num_images <= slots
            if not fits:
                end = self._cut(place, room, slots) if self._may_cut(place) else first
                if end == first:
                    continue
                length = end - first if num_images else length
            if name not in best or (fits, length) > best[name][:2]:
                best[name] = fits, length, place
        if not best:
            return None
        return best[
            self._next_source({name: min(n, room) for name, (_, n, _) in best.items()}, self._tokens_served())
        ][2]

    def _tokens_served(self) -> dict[str, int]:
        """By source: positions packed, counted from where the stream joined the mixture."""
        return {name: self._phase[name] + self.state.positions_packed[name] for name in self._sources}

    def _next_source(self, lengths: dict[str, int], credit: dict[str, int]) -> str:
        """The source whose next positions, by their middle, are due first by its weight.

        By the middle, so that a source of long documents is as often ahead of its weight as behind.
        """
        return min(lengths, key=lambda n: (2 * credit[n] + lengths[n]) / self._config.sources[n].weight)

    def _may_cut(self, place: list) -> bool:
        """Whether what waits may be cut to fill a row: texts, and interleaved documents."""
        name, *_, num_images = place
        return not num_images or self._sources[name].folder.manifest.kind == "interleaved"

    def _cut(self, place: list, room: int, slots: int) -> int:
        """Where to cut what waits so that it fits and images stay whole; its first position where nowhere."""
        return find_cut(self._whole(place), *place[3:5], room, slots, self._least)

    def _next_end(self, document: FlatDocument, first: int) -> int:
        """Where the next piece of a document ends, which holds what a row can."""
        most = first, len(document), self._shape.length, self._shape.num_images
        end = find_cut(document, *most, self._least)
        # Where images leave no other place, a piece may be a sliver; never eos alone.
        return end if end > first else find_cut(document, *most, 2)

    def _read_next(self) -> None:
        """Bring one more document, or piece of a text, into the look-ahead: of the source that lags most."""
        credit = self._tokens_served()
        for name, _, _, first, last, _ in self.state.pending:
            credit[name] += last - first
        name = self._next_source({name: self._next_length(name) for name in self._sources}, credit)
        epoch, order, first = self.state.position[name]
        self.state.num_read += first == 0
        try:
            document = self._whole([name, epoch, order])
        except BadDocument as error:
            self._skip(error)
        else:
            last = self._next_end(document, first)
            here = images_between(document, first, last)
            self.state.pending.append([name, epoch, order, first, last, here.stop - here.start])
            if last < len(document):
                self.state.position[name] = [epoch, order, last]
                return
        ended = order + 1 == self._sources[name].size(self.number)
        self.state.position[name] = [epoch + 1, 0, 0] if ended else [epoch, order + 1, 0]

    def _skip(self, error: BadDocument) -> None:
        """Leave a document out, if that is asked for and has not come to more than chance explains."""
        if self._config.on_error == "fail":
            raise error
        skipped, limit = self.state.skipped, self._config.max_skip_rate
        skipped[error.reason] = skipped.get(error.reason, 0) + 1
        self.warnings.append(f"left out {error}")
        if beyond_chance(sum(skipped.values()), self.state.num_read, limit):
            reasons = ", ".join(f"{count} x {reason}" for reason, count in skipped.items())
            raise UserError(
                f"stream {self.number} left out {sum(skipped.values())} documents of {self.state.num_read} "
                f"({reasons}), more than data.max_skip_rate {limit}; the last: {error}"
            )

    def _start(self, source: Source) -> int:
        """Positions that a source is ahead at the start, as though the stream had been joined anywhere.

        Spread evenly over the streams and over the source's share of a row or its mean document, so that rows
        end at different places of the mixture, and any few of a batch are together like any others.
        """
        place = counter_generator(source.seed, source.number, 0, 0, PHASE).random()
        spread = (place + self.number * math.sqrt(PRIMES[source.number % len(PRIMES)])) % 1
        weights = {name: about.weight for name, about in self._config.sources.items()}
        share = self._shape.length * weights[source.name] / sum(weights.values())
        document = min(source.positions_per_document(self._shape), self._shape.length)
        return int((spread - 0.5) * max(share, document))

    def _next_length(self, name: str) -> int:
        """Positions that would be read next of a source; 0 where its next document is bad."""
        epoch, order, first = self.state.position[name]
        try:
            return self._next_end(self._whole([name, epoch, order]), first) - first
        except BadDocument:
            return 0

    def _whole(self, place: list) -> FlatDocument:
        """The whole document of a place, its images drawn or not; read again where a state names it."""
        key = tuple(place[:3])
        if key not in self._documents:
            self._documents[key] = self._load(*key)
        return self._documents[key][0]

    def _drawn(self, place: list) -> FlatDocument:
        """The whole document with each image drawn, in order, so that no draw depends on where it is cut."""
        document, key = self._whole(place), tuple(place[:3])
        generator = self._documents[key][1]
        if generator:
            manifest = self._sources[place[0]].folder.manifest
            document = sample_noise(document, manifest, self._shape, self._noise_process, generator)
            self._documents[key] = document, None
        return document

    def _forget(self) -> None:
        """Keep the documents that are pending, or read in part, alone."""
        kept = {tuple(place[:3]) for place in self.state.pending}
        kept |= {(name, *place[:2]) for name, place in self.state.position.items()}
        self._documents = {key: value for key, value in self._documents.items() if key in kept}

    def _load(self, name: str, epoch: int, order: int) -> tuple[FlatDocument, np.random.Generator]:
        source = self._sources[name]
        number = source.document_at(self.number, epoch, order)
        generator = counter_generator(source.seed, source.number, number, epoch, DOCUMENT)
        stored = source.read(number)
        where = f"{source.folder.folder}, document {number}"
        source.check(stored, where)
        manifest = source.folder.manifest
        try:
            parts = sample_layout(
                stored.segments,
                manifest,
                self._config,
                self._shape,
                generator,
                is_after_text=bool(stored.metadata.get(AFTER_TEXT)),
            )
        except CorruptBytes as error:
            raise BadDocument(where, str(error)) from error
        texts = (part for part in parts if isinstance(part, np.ndarray))
        if max((text.max(initial=0) for text in texts), default=0) >= self._tokenizer.vocab_size:
            raise BadDocument(where, "a token that the tokenizer does not have")
        document = flatten(parts, self._tokenizer, self._shape.patches)
        start = document.image_start
        longest = int((document.row_end[start] - start).max(initial=0)) + 4
        if longest > self._shape.length:
            raise UserError(
                f"{where} ({stored.metadata.get('caption', '')[:60]!r}): an image takes {longest} positions "
                "with bos, boi, eoi and eos and does not fit in a row of data.sequence_length "
                f"{self._shape.length}; raise it"
            )
        return document, generator
