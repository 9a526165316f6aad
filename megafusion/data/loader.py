"""The data loader: a rank's packed rows of each global batch, with a state to resume from.

Row g of global batch k comes from logical stream (k B + g) mod M. So a rank needs only the streams of its
rows, and so does each of its worker processes.
"""

import logging
from collections import Counter
from functools import partial
from types import TracebackType
from typing import NamedTuple

import torch

from megafusion.data.config import DataConfig
from megafusion.data.logical_stream import LogicalStream
from megafusion.data.source import Source
from megafusion.data.workers import Workers
from megafusion.errors import UserError
from megafusion.objective.noise_process import NoiseProcess
from megafusion.sequence.packing import PackedBatch, SequenceShape, collate, drop_unused_slots
from megafusion.sequence.tokenizer import Tokenizer

FORMAT = 2
MAX_WARNINGS = 100
log = logging.getLogger(__name__)


class WorkerBatch(NamedTuple):
    """One worker's rows of a global batch, and the states of their streams after them."""

    rows: dict[int, PackedBatch]
    """By index g in the global batch."""
    states: dict[str, dict]
    """By stream number: its `state_dict`."""
    warnings: list[str]
    """Documents skipped."""


def build_rows(
    streams: dict[int, LogicalStream], rows: range, global_batch_size: int, num_streams: int, number: int
) -> WorkerBatch:
    """Build some rows of global batch `number`: a rank's, or one worker's. Called for each batch in turn."""
    built = WorkerBatch({}, {}, [])
    for g in rows:
        stream = streams[(number * global_batch_size + g) % num_streams]
        built.rows[g] = stream.next_row()
        built.states[str(stream.number)] = stream.state.state_dict()
        built.warnings.extend(stream.warnings)
        stream.warnings.clear()
    return built


class DataLoader:
    """This rank's packed rows of each global batch.

    global_batch_size: packed sequences B of a global batch. rows: indices of this rank's among them.
    micro_batch_size: packed sequences of a micro-batch. drops_unused_slots: see the function of that name.
    A context manager: its worker processes end with it.
    """

    def __init__(
        self,
        config: DataConfig,
        sources: dict[str, Source],
        shape: SequenceShape,
        tokenizer: Tokenizer,
        noise_process: NoiseProcess,
        global_batch_size: int,
        rows: range,
        micro_batch_size: int,
        drops_unused_slots: bool = False,
    ):
        if config.num_streams % global_batch_size:
            raise UserError(
                f"data.num_streams {config.num_streams} is not a multiple of train.global_batch_size "
                f"{global_batch_size}"
            )
        self._config, self._rows, self._micro_batch_size = config, rows, micro_batch_size
        self._drops_unused_slots, self._max_patches = drops_unused_slots, max(shape.patches)
        self._streams = {
            number: LogicalStream(number, sources, config, shape, tokenizer, noise_process)
            for number in range(config.num_streams)
            if number % global_batch_size in rows
        }
        num_builders = min(config.num_workers, len(rows)) or 1
        self._builders = [
            partial(build_rows, self._streams, rows[i::num_builders], global_batch_size, config.num_streams)
            for i in range(num_builders)
        ]
        self._workers: Workers | None = None
        self._num_warnings = 0
        self._start(0)

    def __enter__(self) -> "DataLoader":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def next(self) -> list[PackedBatch]:
        """This rank's micro-batches of the next global batch. Raises UserError naming a bad document."""
        rows: dict[int, PackedBatch] = {}
        for built in self._build():
            rows |= built.rows
            self._states |= built.states
            for warning in built.warnings:
                self._warn(warning)
        self._batch_number += 1
        first, size = self._rows.start, self._micro_batch_size
        micro_batches = [
            collate([rows[g] for g in range(i, i + size)])
            for i in range(first, first + len(self._rows), size)
        ]
        if self._drops_unused_slots:
            micro_batches = [drop_unused_slots(batch, self._max_patches) for batch in micro_batches]
        return [batch.pinned() for batch in micro_batches] if torch.cuda.is_available() else micro_batches

    def state_dict(self) -> dict:
        """The state after the last batch that `next` returned, in plain values for a checkpoint."""
        return {"format": FORMAT, "batch_number": self._batch_number, "streams": dict(self._states)}

    def load_state_dict(self, state: dict) -> None:
        """Resume from a state. Raises UserError for another format or other sources, or a missing stream."""
        if state.get("format") != FORMAT:
            raise UserError(
                f"the checkpoint's data state has format {state.get('format', 1)}, and this version reads "
                f"{FORMAT}; finish that run with the version that began it, or choose another out="
            )
        self.close()
        for number, stream in self._streams.items():
            found = state["streams"].get(str(number))
            if found is None or set(found["position"]) != set(stream.state.position):
                raise UserError(
                    f"the checkpoint's data state has no stream {number} of sources "
                    f"{', '.join(stream.state.position)}: it has another mixture or data.num_streams"
                )
            stream.load_state_dict(found)
        self._start(state["batch_number"])

    def close(self) -> None:
        """Stop the worker processes; `next` starts them again if it needs them."""
        if self._workers:
            self._workers.close()
            self._workers = None
            for number, stream in self._streams.items():
                stream.load_state_dict(self._states[str(number)])

    def _start(self, batch_number: int) -> None:
        self._batch_number = batch_number
        self._states = {str(number): stream.state.state_dict() for number, stream in self._streams.items()}

    def _build(self) -> list[WorkerBatch]:
        if not self._config.num_workers:
            return [self._builders[0](self._batch_number)]
        if self._workers is None:
            self._workers = Workers(self._builders, self._batch_number, self._config.prefetch)
        return self._workers.next()

    def _warn(self, warning: str) -> None:
        """Log the first warnings; after that metrics have the count."""
        self._num_warnings += 1
        if self._num_warnings <= MAX_WARNINGS:
            is_last = self._num_warnings == MAX_WARNINGS
            log.warning("%s%s", warning, "; later ones are only counted" if is_last else "")


def packed_and_skipped(state: dict) -> tuple[Counter[str], int]:
    """Positions packed by source, and documents skipped, over the streams of a loader's `state_dict`."""
    packed: Counter[str] = Counter()
    skipped = 0
    for stream in state["streams"].values():
        packed.update(stream["positions_packed"])
        skipped += sum(stream["skipped"].values())
    return packed, skipped
