"""A contiguous range of a flattened parameter, as n-dimensional chunks of the whole parameter.

ZeRO splits flattened parameters at any element; torch.distributed.checkpoint (DCP) stores n-dimensional
chunks of whole tensors. A range is at most 2 n - 1 chunks (part of a row, whole rows, part of a row; and so
on inward), for each span of its ShardSpec. Chunks are views: reading into one fills the optimizer's storage.

DCP's own planners accept only tensors, reject overlapping chunks, and unpickle objects that are not tensors.
"""

import io
from bisect import bisect_left
from copy import copy
from dataclasses import dataclass, replace
from math import prod
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    create_default_global_save_plan,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem, SavePlan, TensorWriteData, WriteItem, WriteItemType

from megafusion.parallel.sharding import ShardSpec

Bounds = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes of a chunk, by dimension."""


def chunk_bounds(shape: tuple[int, ...], start: int, stop: int) -> list[Bounds]:
    """The chunks that make up elements [start, stop) of a flattened tensor, in the order of the elements."""
    if start >= stop:
        return []
    if not shape:
        return [((), ())]
    inner = prod(shape[1:])

    def in_row(row: int, begin: int, end: int) -> list[Bounds]:
        return [((row, *offsets), (1, *sizes)) for offsets, sizes in chunk_bounds(shape[1:], begin, end)]

    first, last = -(-start // inner), stop // inner  # whole rows
    if first > last:
        return in_row(last, start - last * inner, stop - last * inner)
    chunks = in_row(first - 1, start - (first - 1) * inner, inner) if start % inner else []
    if first < last:
        chunks.append(((first, *(0 for _ in shape[1:])), (last - first, *shape[1:])))
    return chunks + (in_row(last, 0, stop % inner) if stop % inner else [])


def is_covered(shape: tuple[int, ...], chunks: list[Bounds]) -> bool:
    """Whether chunks, which may overlap, cover a tensor."""
    boxes = [[(low, low + size) for low, size in zip(*chunk, strict=True)] for chunk in chunks]
    # Cut along the edges of all chunks: each cell is in a chunk as a whole, or outside of it.
    edges = [
        sorted({0, size, *(edge for box in boxes for edge in box[dim])}) for dim, size in enumerate(shape)
    ]
    covered = np.zeros([len(cuts) - 1 for cuts in edges], dtype=bool)
    for box in boxes:
        spans = [[bisect_left(cuts, edge) for edge in span] for cuts, span in zip(edges, box, strict=True)]
        covered[tuple(slice(*span) for span in spans)] = True
    return bool(covered.all())


@dataclass(frozen=True)
class Chunk:
    """Part of a whole tensor: its offsets there, and its values (a view)."""

    offsets: tuple[int, ...]
    values: Tensor


class Chunks:
    """A rank's part of a whole tensor, under the protocol of torch/distributed/_checkpointable.py.

    fragment: 1-D, elements [start, start + len(fragment)) of the flattened local parameter of shard_spec.
    """

    def __init__(self, fragment: Tensor, start: int, shard_spec: ShardSpec):
        self.fragment, self.start, self.shard_spec = fragment, start, shard_spec
        self.chunks: list[Chunk] = []
        local_shape = list(shard_spec.shape)
        if local_shape:
            local_shape[shard_spec.dim] = sum(span.length for span in shard_spec.spans)
        used = 0
        for offsets, sizes in chunk_bounds(tuple(local_shape), start, start + len(fragment)):
            values = fragment[used : used + prod(sizes)].view(sizes)
            used += prod(sizes)
            self.chunks += _to_whole(offsets, values, shard_spec)

    def first_rows(self, num_rows: int) -> "Chunks":
        """The part of these chunks in the first rows of the whole tensor, as chunks of a tensor of those."""
        first = copy(self)
        first.shard_spec = replace(self.shard_spec, shape=torch.Size([num_rows, *self.size()[1:]]))
        first.chunks = [
            Chunk(chunk.offsets, chunk.values[: num_rows - chunk.offsets[0]])
            for chunk in self.chunks
            if chunk.offsets[0] < num_rows
        ]
        return first

    def size(self) -> torch.Size:
        """Shape of the whole tensor."""
        return self.shard_spec.shape

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        properties = TensorProperties(dtype=self.fragment.dtype)
        return [
            WriteItem(
                MetadataIndex(name, chunk.offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, self.size()),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(chunk.offsets), chunk.values.shape) for chunk in self.chunks]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return next(chunk.values for chunk in self.chunks if chunk.offsets == index.offset)


def _to_whole(offsets: tuple[int, ...], values: Tensor, shard_spec: ShardSpec) -> list[Chunk]:
    """A chunk of the local parameter as chunks of the whole one, one for each span that it overlaps."""
    if not offsets:
        return [Chunk(offsets, values)]
    dim, chunks = shard_spec.dim, []
    begin, end = offsets[dim], offsets[dim] + values.shape[dim]
    for span in shard_spec.spans:
        low, high = max(begin, span.local_start), min(end, span.local_start + span.length)
        if low < high:
            whole = (*offsets[:dim], span.whole_start + low - span.local_start, *offsets[dim + 1 :])
            chunks.append(Chunk(whole, values.narrow(dim, low - begin, high - low)))
    return chunks


class ChunkSavePlanner(DefaultSavePlanner):
    """Writes each rank's chunks, equal ones once.

    Tensor-parallel ranks hold equal copies of a replicated parameter, and ZeRO may split each copy elsewhere.
    Chunks of such copies overlap. Their values are equal, so either may be written and read, and overlap is
    allowed. DCP identifies a chunk by name and offsets, and of chunks with equal offsets keeps one, short or
    long. This leaves no gap: where the kept one ends, the next chunk of its own copy begins.
    """

    def __init__(self):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans = self._dedup_save_plans(all_plans)
        plans, metadata = create_default_global_save_plan(plans)
        for name, entry in metadata.state_dict_metadata.items():
            assert isinstance(entry, TensorStorageMetadata), name
            chunks = [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks]
            assert is_covered(tuple(entry.size), chunks), f"{name}: the chunks of all ranks do not cover it"
        return plans, metadata

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].__get_tensor_shard__(index)


class ChunkLoadPlanner(DefaultLoadPlanner):
    """Reads tensors, and nothing else, into chunks."""

    def __init__(self):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self, state_dict: dict[str, Chunks], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        # DCP's own replaces everything that is not a tensor by None.
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> NoReturn:
        raise AssertionError(f"{read_item.dest_index.fqn}: pickled bytes, which are never loaded")

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].__get_tensor_shard__(index)
