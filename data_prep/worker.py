"""The work of one process: scan input splits, write shards."""

from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from data_prep.config import PreprocessConfig
from data_prep.plan import line_offsets, records_at
from data_prep.readers.interleaved import NamedImages
from data_prep.readers.records import BadRecord, Dropped, Reader, Record
from data_prep.readers.splits import InputSplit, open_reader
from data_prep.readers.webdataset import plain_name
from data_prep.scan import scan_split, table_path
from data_prep.write import CHANGED, DocumentBuilder, write_shard_once
from megafusion.data.manifest import Kind
from megafusion.errors import UserError
from megafusion.images.codec import ImageCodec
from megafusion.sequence.tokenizer import Tokenizer


class WorkerSettings(NamedTuple):
    """Settings that all workers of a kind share."""

    kind: Kind
    config: PreprocessConfig
    splits: list[InputSplit]
    selected_keys: set[str] | None
    """Keys of the pairs to keep; None: all."""
    folder: Path
    """Folder of the shards."""
    work: Path
    """Folder of the scan's tables and the shards' summaries."""


class ShardTask(NamedTuple):
    """A shard to write, and its records: split and row in the split's table."""

    number: int
    splits: np.ndarray
    rows: np.ndarray


class Worker:
    """Scans splits and writes shards. Workers are assigned to GPUs round-robin by their index."""

    def __init__(self, settings: WorkerSettings, index: int, count: Callable[[int], None]):
        self._settings, self._index, self._count = settings, index, count
        self._named_images = NamedImages(settings.config.document_images)
        self._opened: tuple[int, Reader] | None = None

    def scan(self, split: int) -> None:
        """Write a split's table, unless it exists."""
        settings = self._settings
        out = table_path(settings.work, split)
        if not out.is_file():
            scan_split(
                settings.splits[split],
                lambda: self._reader(split),
                settings.config,
                settings.selected_keys,
                out,
                self._count,
            )

    def write(self, task: ShardTask) -> None:
        """Write a shard, unless it is complete."""
        settings = self._settings
        write_shard_once(
            settings.folder,
            settings.work,
            task.number,
            lambda: self._builder.documents(self._records(task)),
        )

    def _records(self, task: ShardTask) -> Iterator[tuple[Record, Any, str, dict]]:
        is_one_file = len({split.files for split in self._settings.splits}) == 1
        for split in np.unique(task.splits):
            path = table_path(self._settings.work, int(split))
            for record in records_at(path, task.rows[task.splits == split], self._line_offsets[split]):
                reader = self._reader(int(split))
                try:
                    raw = reader.read(record)
                except (BadRecord, Dropped) as error:
                    raise UserError(
                        f"{reader.where(record)}: {CHANGED} ({error.reason}); start again"
                    ) from error
                # Of one file, documents are known by their line, and the manifest names it.
                origin = (
                    {} if is_one_file else {"file": plain_name(str(self._settings.splits[split].files[0]))}
                )
                yield record, raw, reader.where(record), origin
                self._count(1)

    def _reader(self, split: int) -> Reader:
        if self._opened is None or self._opened[0] != split:
            settings = self._settings
            reader = open_reader(settings.kind, settings.splits[split], settings.config, self._named_images)
            self._opened = split, reader
        return self._opened[1]

    @cached_property
    def _line_offsets(self) -> list[int]:
        splits = self._settings.splits
        return line_offsets(splits, [table_path(self._settings.work, split.number) for split in splits])

    @cached_property
    def _builder(self) -> DocumentBuilder:
        config, codec = self._settings.config, None
        if self._settings.kind != "text" and config.image_storage == "latents":
            torch.backends.cudnn.deterministic = True
            num_gpus = torch.cuda.device_count()
            device = f"cuda:{self._index % num_gpus}" if num_gpus else "cpu"
            codec = ImageCodec.from_pretrained(config.vae, device)
        return DocumentBuilder(config, Tokenizer.from_pretrained(config.tokenizer), codec)
