"""Reads the tensors of a checkpoint, or of another source, into chunks."""

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, Protocol

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from megafusion.checkpoint.chunks import ChunkLoadPlanner, Chunks
from megafusion.checkpoint.tensor_list import read_shapes, read_tensor_list
from megafusion.errors import UserError
from megafusion.parallel.sharding import shard_spec_of


class TensorSource(Protocol):
    """Whole tensors by name, of which each rank reads the chunks that it needs; str() names it in errors."""

    def shapes(self) -> dict[str, torch.Size]: ...

    def read(self, chunks: dict[str, Chunks]) -> None:
        """Fill chunks, by the name of their tensor."""


class CheckpointReader(FileSystemReader):
    """The tensors `KIND.PARAMETER` of a checkpoint, a TensorSource. Runs no code that the files name."""

    def __init__(self, checkpoint: Path):
        super().__init__(checkpoint / "tensors")
        self._checkpoint = checkpoint

    def __str__(self) -> str:
        return str(self._checkpoint)

    def read_metadata(self, *args: object, **kwargs: object) -> Metadata:
        metadata = read_tensor_list(self._checkpoint)
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def shapes(self) -> dict[str, torch.Size]:
        return {name: torch.Size(shape) for name, shape in read_shapes(self._checkpoint).items()}

    def read(self, chunks: dict[str, Chunks]) -> None:
        with warnings.catch_warnings():
            # Each rank reads what it needs; no plan is shared.
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.load(chunks, storage_reader=self, planner=ChunkLoadPlanner(), no_dist=True)


def read_chunks(source: TensorSource, chunks: dict[str, Chunks], shapes: dict[str, torch.Size]) -> None:
    """Fill this rank's chunks of a model with these shapes. UserError if the source has other tensors."""
    stored = source.shapes()
    for name in sorted(stored.keys() | shapes.keys()):
        if misfit := describe_misfit(name, stored.get(name), shapes.get(name)):
            raise UserError(
                f"{source}: holds another model: {misfit}; use the model configuration that it was saved with"
            )
    source.read(chunks)


def describe_misfit(name: str, there: torch.Size | None, here: torch.Size | None) -> str:
    """How a tensor of a source differs from this model's; empty if it does not. None: no such tensor."""
    first, second = ("is missing" if shape is None else f"has shape {list(shape)}" for shape in (there, here))
    return "" if there == here else f"{name} {first} there, but {second} in this model"


class CheckpointWeights:
    """Weights of a checkpoint by parameter name, averaged or raw: a TensorSource.

    Of a frozen parameter there is no average: its weight is read instead. without: of the beginning of names,
    parameters that are left out.
    """

    def __init__(self, checkpoint: Path, kind: Literal["ema", "model"], without: str | None = None):
        self._reader, self._kind, self._without = CheckpointReader(checkpoint), kind, without

    def __str__(self) -> str:
        return str(self._reader)

    def shapes(self) -> dict[str, torch.Size]:
        stored = self._reader.shapes()
        return {name: stored[key] for name, key in self._keys(stored).items()}

    def read(self, chunks: dict[str, Chunks]) -> None:
        keys = self._keys(self._reader.shapes())
        self._reader.read({keys[name]: part for name, part in chunks.items()})

    def _keys(self, stored: Iterable[str]) -> dict[str, str]:
        """The tensor of each parameter."""
        keys: dict[str, str] = {}
        for kind in ("model", self._kind):  # the second replaces the first
            keys |= {key.partition(".")[2]: key for key in stored if key.startswith(f"{kind}.")}
        if self._without is not None:
            keys = {name: key for name, key in keys.items() if not name.startswith(self._without)}
        return keys


def fill_tensors(source: TensorSource, tensors: dict[str, Tensor]) -> None:
    """Fill whole tensors by name, in one process. UserError if the source has other tensors."""
    in_rows = {name: tensor.contiguous() for name, tensor in tensors.items()}
    read_chunks(source, _whole(in_rows), {name: tensor.shape for name, tensor in tensors.items()})
    for name, tensor in tensors.items():
        if in_rows[name] is not tensor:  # a copy of one that is stored by columns, as for decoding on a CPU
            tensor.copy_(in_rows[name])


def read_tensors(source: TensorSource, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """Some of a source's tensors, whole, in float32. shapes: theirs, by name."""
    tensors = {name: torch.empty(shape) for name, shape in shapes.items()}
    source.read(_whole(tensors))
    return tensors


def _whole(tensors: dict[str, Tensor]) -> dict[str, Chunks]:
    return {name: Chunks(tensor.view(-1), 0, shard_spec_of(tensor)) for name, tensor in tensors.items()}
