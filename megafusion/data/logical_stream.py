"""Logical streams: an order of packed rows that no rank, worker or restart can change.

M logical streams define the order. Each owns a fixed range of every source's documents, shuffles it anew
each epoch, and packs rows from it. All randomness (shuffling, t, noise, order of caption and image,
caption dropout) comes from a counter-based generator keyed by the seed, the document and the epoch. So a
stream's state is a few integers: the documents that are not packed yet, and where it reads next.
"""

import math

from megafusion.data.config import DataConfig
from megafusion.data.document_format import BadDocument, exceeds_error_budget
from megafusion.data.source import PHASE, Source, counter_generator
from megafusion.data.stream_documents import StreamDocuments
from megafusion.data.stream_state import Cursor, DocumentKey, Pending, StreamState
from megafusion.errors import UserError
from megafusion.objective.noise_process import NoiseProcess
from megafusion.sequence.document import FlatDocument, cut_document, find_cut, images_between
from megafusion.sequence.packing import PackedBatch, SequenceShape, pack_row
from megafusion.sequence.tokenizer import Tokenizer

PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53)


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
        self.number, self._sources, self._config, self._shape = number, sources, config, shape
        self.state = StreamState(dict.fromkeys(sources, Cursor(0, 0, 0)), dict.fromkeys(sources, 0))
        self.warnings: list[str] = []
        """Documents skipped since the list was last cleared."""
        self._num_bad = dict.fromkeys(sources, 0)
        """By source: documents skipped since the last good one."""
        self._documents = StreamDocuments(number, sources, config, shape, tokenizer, noise_process)
        self._initial_leads = {name: self._initial_lead(source) for name, source in sources.items()}
        # Minimum positions on either side of a cut: shorter pieces teach nothing.
        self._min_piece = max(2, shape.length // 64)

    def load_state_dict(self, state: dict) -> None:
        """Resume from the `state.state_dict()` of this stream."""
        self.state = StreamState.from_state_dict(state)
        self._documents.keep_only(set())

    def next_row(self) -> PackedBatch:
        """The next packed row (see `pack_row`); `state` then describes the stream after it.

        The oldest pending document opens the row, so that none waits forever. Then comes the longest that
        still fits, of the source that is due. When none fits, a text or an interleaved document is cut to
        fill the row; the rest keeps its index in the packing buffer.
        """
        chosen: list[FlatDocument] = []
        room, slots = self._shape.length, self._shape.num_images
        while True:
            while len(self.state.pending) < self._config.packing_buffer_size:
                self._read_next()
            pending = self._choose(room, slots) if chosen else self.state.pending[0]
            if pending is None:
                break
            end = self._find_cut(pending, room, slots)
            get = self._documents.get_sampled if pending.num_images else self._documents.get
            piece = cut_document(get(pending.key), pending.start, end)
            if end < pending.end:
                pending.start = end
                pending.num_images -= len(piece.images)
            else:
                self.state.pending.remove(pending)
            chosen.append(piece)
            length = piece.positions_in_row(0, len(piece))
            room -= length
            slots -= len(piece.images)
            self.state.positions_packed[pending.key.source] += length
        self._documents.keep_only(self._needed())
        return pack_row(chosen, self._shape)

    def _choose(self, room: int, slots: int) -> Pending | None:
        """The document to pack next: of the source that is due, the longest that fits or can be cut."""
        best: dict[str, tuple[bool, int, Pending]] = {}
        for pending in self.state.pending:
            source = pending.key.source
            length = self._length(pending)
            fits = length <= room and pending.num_images <= slots
            if not fits:
                end = self._find_cut(pending, room, slots) if self._may_cut(pending) else pending.start
                if end == pending.start:
                    continue
                if pending.num_images:
                    length = self._documents.get(pending.key).positions_in_row(pending.start, end)
            if source not in best or (fits, length) > best[source][:2]:
                best[source] = fits, length, pending
        if not best:
            return None
        lengths = {name: min(length, room) for name, (_, length, _) in best.items()}
        return best[self._next_source(lengths, self._tokens_served())][2]

    def _length(self, pending: Pending) -> int:
        """Positions that a document takes in a row."""
        if not (self._shape.clean_context and pending.num_images):
            return pending.end - pending.start
        return self._documents.get(pending.key).positions_in_row(pending.start, pending.end)

    def _tokens_served(self) -> dict[str, int]:
        """By source: positions packed, plus its initial lead."""
        return {name: self._initial_leads[name] + self.state.positions_packed[name] for name in self._sources}

    def _next_source(self, lengths: dict[str, int], served: dict[str, int]) -> str:
        """The source that is due: the middle of its next positions comes first by its weight.

        The middle, so that a source of long documents is as often ahead of its weight as behind it.
        """
        return min(lengths, key=lambda n: (2 * served[n] + lengths[n]) / self._config.sources[n].weight)

    def _may_cut(self, pending: Pending) -> bool:
        """Whether a document may be cut to fill a row: texts may, and interleaved documents, unless an image
        is given: what follows would lose its condition."""
        if not pending.num_images:
            return True
        is_interleaved = self._sources[pending.key.source].folder.manifest.kind == "interleaved"
        return is_interleaved and not any(i.is_given for i in self._documents.get(pending.key).images)

    def _find_cut(self, pending: Pending, room: int, slots: int) -> int:
        """Where to cut a document so that it fits and no image is split; its start if nowhere."""
        document = self._documents.get(pending.key)
        return find_cut(document, pending.start, pending.end, room, slots, self._min_piece)

    def _piece_end(self, document: FlatDocument, start: int) -> int:
        """End of the next piece of a document, which holds at most what a row can."""
        limits = start, len(document), self._shape.length, self._shape.num_images
        end = find_cut(document, *limits, self._min_piece)
        # Where images leave no other cut, a piece may be shorter; never eos alone.
        return end if end > start else find_cut(document, *limits, 2)

    def _read_next(self) -> None:
        """Add a document, or a piece of one, to the packing buffer: of the source that lags most."""
        served = self._tokens_served()
        for pending in self.state.pending:
            served[pending.key.source] += self._length(pending)
        name = self._next_source({name: self._next_length(name) for name in self._sources}, served)
        epoch, order, start = self.state.position[name]
        key = DocumentKey(name, epoch, order)
        self.state.num_read += start == 0
        try:
            document = self._documents.get(key)
        except BadDocument as error:
            self._skip(error, name)
        else:
            self._num_bad[name] = 0
            end = self._piece_end(document, start)
            images = images_between(document, start, end)
            self.state.pending.append(Pending(key, start, end, images.stop - images.start))
            if end < len(document):
                self.state.position[name] = Cursor(epoch, order, end)
                return
        is_last = order + 1 == self._sources[name].size(self.number)
        self.state.position[name] = Cursor(epoch + 1, 0, 0) if is_last else Cursor(epoch, order + 1, 0)

    def _next_length(self, name: str) -> int:
        """Positions that would be read next of a source; 0 where its next document is bad."""
        epoch, order, start = self.state.position[name]
        try:
            document = self._documents.get(DocumentKey(name, epoch, order))
            return document.positions_in_row(start, self._piece_end(document, start))
        except BadDocument:
            return 0

    def _skip(self, error: BadDocument, source: str) -> None:
        """Skip a document if data.on_error allows it. UserError if that exceeds the error budget, or leaves
        none of the source."""
        if self._config.on_error == "fail":
            raise error
        skipped, limit = self.state.skipped, self._config.max_skip_rate
        skipped[error.reason] = skipped.get(error.reason, 0) + 1
        self.warnings.append(f"skipped {error}")
        reasons = ", ".join(f"{count} x {reason}" for reason, count in skipped.items())
        self._num_bad[source] += 1
        if exceeds_error_budget(sum(skipped.values()), self.state.num_read, limit):
            raise UserError(
                f"stream {self.number} skipped {sum(skipped.values())} documents of {self.state.num_read} "
                f"({reasons}), more than data.max_skip_rate {limit}; the last: {error}"
            )
        if self._num_bad[source] >= self._sources[source].size(self.number):
            raise UserError(
                f"data.sources.{source}: no good document among the {self._num_bad[source]} of stream "
                f"{self.number} ({reasons}); the last: {error}"
            )

    def _initial_lead(self, source: Source) -> int:
        """Positions that a source counts as served at the start, as though the stream had run before.

        Spread evenly over the streams, and over the source's share of a row or its mean document. So rows end
        at different phases of the mixture, and every batch holds about the same mixture.
        """
        random = counter_generator(source.seed, source.number, 0, 0, PHASE).random()
        spread = (random + self.number * math.sqrt(PRIMES[source.number % len(PRIMES)])) % 1
        weights = {name: about.weight for name, about in self._config.sources.items()}
        share = self._shape.length * weights[source.name] / sum(weights.values())
        document = min(source.positions_per_document(self._shape), self._shape.length)
        return int((spread - 0.5) * max(share, document))

    def _needed(self) -> set[DocumentKey]:
        """Documents that are pending or read in part."""
        cursors = self.state.position.items()
        return {pending.key for pending in self.state.pending} | {DocumentKey(n, *c[:2]) for n, c in cursors}
