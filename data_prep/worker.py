"""What one process does: scan pieces, make shards."""

from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from data_prep.config import PreprocessConfig
from data_prep.plan import lines_before, records_at
from data_prep.readers.documents import NamedPictures
from data_prep.readers.inputs import InputSplit, open_piece
from data_prep.readers.records import BadRecord, Reader, Record
from data_prep.scan import scan_piece
from data_prep.write import CHANGED, DocumentMaker, make_shard
from megafusion.data.shards import Kind
from megafusion.errors import UserError
from megafusion.images.codec import ImageCodec
from megafusion.sequence.tokenizer import Tokenizer


class WorkerSettings(NamedTuple):
    """What every worker of a kind works on."""

    kind: Kind
    config: PreprocessConfig
    pieces: list[InputSplit]
    wanted: set[str] | None
    """Keys of the pairs to keep; None: all."""
    folder: Path
    """Where shards go."""
    work: Path
    """Where tables of the scan and records of shards go."""


class ShardTask(NamedTuple):
    """A shard and where its records stand: piece and row in the piece's table."""

    number: int
    pieces: np.ndarray
    rows: np.ndarray


class Worker:
    """Scans pieces and makes shards. With GPUs, the n-th worker uses the n-th of them, round and round."""

    def __init__(self, settings: WorkerSettings, number: int, count: Callable[[int], None]):
        self._settings, self._number, self._count = settings, number, count
        self._named = NamedPictures(settings.config.document_pictures)
        self._opened: tuple[int, Reader] | None = None

    def scan(self, piece: int) -> None:
        """Write a piece's table, unless it is there."""
        out = table_path(self._settings.work, piece)
        if not out.is_file():
            scan_piece(
                self._settings.pieces[piece],
                lambda: self._reader(piece),
                self._settings.config,
                self._settings.wanted,
                out,
                self._count,
            )

    def make(self, task: ShardTask) -> None:
        """Make a shard, unless it is there whole."""
        make_shard(
            self._settings.folder,
            self._settings.work,
            task.number,
            lambda: self._maker.documents(self._records(task)),
        )

    def _records(self, task: ShardTask) -> Iterator[tuple[Record, Any, str]]:
        for piece in np.unique(task.pieces):
            path = table_path(self._settings.work, int(piece))
            for record in records_at(path, task.rows[task.pieces == piece], self._before[piece]):
                reader = self._reader(int(piece))
                try:
                    raw = reader.read(record)
                except BadRecord as error:
                    raise UserError(
                        f"{reader.where(record)}: {CHANGED} ({error.reason}); start again"
                    ) from error
                yield record, raw, reader.where(record)
                self._count(1)

    def _reader(self, piece: int) -> Reader:
        if self._opened is None or self._opened[0] != piece:
            settings = self._settings
            reader = open_piece(settings.kind, settings.pieces[piece], settings.config, self._named)
            self._opened = piece, reader
        return self._opened[1]

    @cached_property
    def _before(self) -> list[int]:
        pieces = self._settings.pieces
        return lines_before(pieces, [table_path(self._settings.work, piece.number) for piece in pieces])

    @cached_property
    def _maker(self) -> DocumentMaker:
        config, codec = self._settings.config, None
        if self._settings.kind != "text" and config.images == "latents":
            torch.backends.cudnn.deterministic = True
            gpus = torch.cuda.device_count()
            device = f"cuda:{self._number % gpus}" if gpus else "cpu"
            codec = ImageCodec.from_pretrained(config.vae, device)
        return DocumentMaker(config, Tokenizer.from_pretrained(config.tokenizer), codec)


def table_path(work: Path, piece: int) -> Path:
    """Where a piece's table of the scan stands."""
    return work / "scan" / f"{piece:06d}.parquet"
