"""A rank's rows of each global batch, and the state that goes on from it.

Row g of global batch k comes from logical stream (k B + g) mod M, so a rank needs the streams of its rows
and no others, and so does a worker of the rows that are its share.
"""

import logging
from collections import Counter
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple

import numpy as np
import torch

from megafusion.data.config import DataConfig
from megafusion.data.logical_stream import LogicalStream
from megafusion.data.source import Source
from megafusion.data.workers import Workers
from megafusion.errors import UserError
from megafusion.objective.noise_process import NoiseProcess
from megafusion.sequence.packing import PackedBatch, SequenceShape, collate
from megafusion.sequence.tokenizer import Tokenizer

FORMAT = 2
log = logging.getLogger(__name__)


class WorkerBatch(NamedTuple):
    """Some rows of a global batch, and what their streams have become."""

    rows: dict[int, dict[str, np.ndarray]]
    """By their number g in the global batch."""
    states: dict[str, dict]
    """By stream: its state after its row; of the streams that gave one."""
    warnings: list[str]
    """What was left out."""


class RowBuilder:
    """Makes some rows of each global batch: those of a rank, or of one of its workers."""

    def __init__(self, streams: dict[int, LogicalStream], rows: list[int], num_rows: int, num_streams: int):
        self._streams, self._rows, self._num_rows, self._num_streams = streams, rows, num_rows, num_streams

    def make(self, batch_number: int) -> WorkerBatch:
        """The rows of a global batch, which must follow the one before."""
        share = WorkerBatch({}, {}, [])
        for g in self._rows:
            stream = self._streams[(batch_number * self._num_rows + g) % self._num_streams]
            share.rows[g] = stream.next_row()
            share.states[str(stream.number)] = stream.state.plain()
            share.warnings.extend(stream.warnings)
            stream.warnings.clear()
        return share


@dataclass(frozen=True)
class GlobalBatch:
    """This rank's micro-batches of one global batch, and the state to go on from after it."""

    micro_batches: list[PackedBatch]
    state: dict


class DataLoader:
    """This rank's rows of each global batch, from the logical streams that they need.

    num_rows: rows B of a global batch; rows: those of this rank; micro_batch_size: rows at a time.
    A context: what workers it has started end with it.
    """

    def __init__(
        self,
        config: DataConfig,
        sources: dict[str, Source],
        shape: SequenceShape,
        tokenizer: Tokenizer,
        noise_process: NoiseProcess,
        num_rows: int,
        rows: range,
        micro_batch_size: int,
    ):
        if config.num_streams % num_rows:
            raise UserError(
                f"data.num_streams {config.num_streams} is not a multiple of the "
                f"{num_rows} rows of a global batch"
            )
        self._config, self._rows, self._micro_batch_size = config, rows, micro_batch_size
        self._streams = {
            number: LogicalStream(number, sources, config, shape, tokenizer, noise_process)
            for number in range(config.num_streams)
            if number % num_rows in rows
        }
        shares = min(config.num_workers, len(rows)) or 1
        self._makers = [
            RowBuilder(self._streams, list(rows[i::shares]), num_rows, config.num_streams)
            for i in range(shares)
        ]
        self._workers: Workers | None = None
        self._told = 0
        self._start(0)

    def __enter__(self) -> "DataLoader":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def next(self) -> GlobalBatch:
        """The next global batch's rows. Raises UserError naming the document that is bad."""
        rows: dict[int, dict[str, np.ndarray]] = {}
        for share in self._shares():
            rows |= share.rows
            self._states |= share.states
            for line in share.warnings:
                self._tell(line)
        self._batch_number += 1
        first, size = self._rows.start, self._micro_batch_size
        micro_batches = [
            collate([rows[g] for g in range(i, i + size)])
            for i in range(first, first + len(self._rows), size)
        ]
        if torch.cuda.is_available():
            micro_batches = [batch.pinned() for batch in micro_batches]
        return GlobalBatch(micro_batches, self.state())

    def state(self) -> dict:
        """Plain values for a checkpoint: the batch's number and the state of each stream of this rank.

        Of the batches handed out, however many workers have made ahead.
        """
        return {"format": FORMAT, "batch_number": self._batch_number, "streams": dict(self._states)}

    def restore(self, state: dict) -> None:
        """Go on from a state, which may hold more streams than this rank needs.

        Raises UserError where it is of another layout, of other sources, or lacks a stream.
        """
        if state.get("format") != FORMAT:
            raise UserError(
                f"the checkpoint's place in the data is of format {state.get('format', 1)}, and this version "
                f"reads {FORMAT}; finish that run with the version that began it, or choose another out="
            )
        self.close()
        for number, stream in self._streams.items():
            found = state["streams"].get(str(number))
            if found is None or set(found["position"]) != set(stream.state.position):
                raise UserError(
                    f"the checkpoint's place in the data has no stream {number} of sources "
                    f"{', '.join(stream.state.position)}: it is of another mixture or data.num_streams"
                )
            stream.resume(found)
        self._start(state["batch_number"])

    def close(self) -> None:
        """End the workers, if there are any; `next` would start them again where they are needed."""
        if self._workers:
            self._workers.close()
            self._workers = None
            for number, stream in self._streams.items():
                stream.resume(self._states[str(number)])

    def _start(self, batch_number: int) -> None:
        self._batch_number = batch_number
        self._states = {str(number): stream.state.plain() for number, stream in self._streams.items()}

    def _shares(self) -> list[WorkerBatch]:
        if not self._config.num_workers:
            return [self._makers[0].make(self._batch_number)]
        if self._workers is None:
            self._workers = Workers(
                [maker.make for maker in self._makers], self._batch_number, self._config.prefetch
            )
        return self._workers.next()

    def _tell(self, line: str) -> None:
        """Each of the first hundred, then a count is enough: metrics have it."""
        self._told += 1
        if self._told <= 100:
            log.warning("%s%s", line, "; later ones are counted alone" if self._told == 100 else "")


def packed_and_skipped(state: dict) -> tuple[Counter[str], int]:
    """Of the streams of a state: positions packed by source, and documents left out."""
    packed: Counter[str] = Counter()
    skipped = 0
    for stream in state["streams"].values():
        packed.update(stream["positions_packed"])
        skipped += sum(stream["skipped"].values())
    return packed, skipped
