"""A contiguous range of a flattened parameter, as n-dimensional boxes of the whole parameter.

ZeRO cuts flattened parameters anywhere; torch.distributed.checkpoint stores boxes of whole tensors. A range
is at most 2 n - 1 boxes (part of a row, whole rows, part of a row; and so on inward), each once a run of the
parameter's layout. Boxes are views: what is read is written straight into the optimizer's storage.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from megafusion.parallel.sharding import ShardSpec

Place = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes of a box."""


def cut_range(shape: tuple[int, ...], start: int, stop: int) -> list[Place]:
    """The boxes that elements [start, stop) of a flattened tensor make up, in their order there."""
    if start >= stop:
        return []
    if not shape:
        return [((), ())]
    inner = prod(shape[1:])

    def in_row(row: int, begin: int, end: int) -> list[Place]:
        return [((row, *offsets), (1, *sizes)) for offsets, sizes in cut_range(shape[1:], begin, end)]

    first, last = -(-start // inner), stop // inner  # whole rows
    if first > last:
        return in_row(last, start - last * inner, stop - last * inner)
    boxes = in_row(first - 1, start - (first - 1) * inner, inner) if start % inner else []
    if first < last:
        boxes.append(((first, *(0 for _ in shape[1:])), (last - first, *shape[1:])))
    return boxes + (in_row(last, 0, stop % inner) if stop % inner else [])


def is_covered(shape: tuple[int, ...], boxes: Iterable[Place]) -> bool:
    """Whether boxes, which may overlap, fill a tensor."""
    left = [((0,) * len(shape), tuple(shape))]
    for box in sorted(boxes):  # in order, so that little is left in pieces
        left = [piece for rest in left for piece in _without(rest, box)]
    return not left


def _without(box: Place, taken: Place) -> list[Place]:
    """What is left of a box, in boxes."""
    offsets, sizes = box
    begins = [max(a, b) for a, b in zip(offsets, taken[0], strict=True)]
    ends = [min(a + n, b + m) for a, n, b, m in zip(offsets, sizes, *taken, strict=True)]
    if any(begin >= end for begin, end in zip(begins, ends, strict=True)):
        return [box]
    pieces = []
    for dim, (begin, end) in enumerate(zip(begins, ends, strict=True)):
        for low, high in ((offsets[dim], begin), (end, offsets[dim] + sizes[dim])):
            if low < high:
                piece = (*begins[:dim], low, *offsets[dim + 1 :])
                lengths = [e - b for b, e in zip(begins[:dim], ends[:dim], strict=True)]
                pieces.append((piece, (*lengths, high - low, *sizes[dim + 1 :])))
    return pieces


@dataclass(frozen=True)
class Box:
    """Part of a whole tensor: where it begins there, and its values (a view)."""

    offsets: tuple[int, ...]
    values: Tensor


class Chunks:
    """What a rank holds of a whole tensor, in the protocol of torch/distributed/_checkpointable.py.

    fragment: 1-D, elements [start, start + len) of the flattened local parameter that layout describes.
    """

    def __init__(self, fragment: Tensor, start: int, layout: ShardSpec):
        self.shape, self.dtype = layout.shape, fragment.dtype
        self.boxes: list[Box] = []
        local = list(layout.shape)
        if local:
            local[layout.dim] = sum(run.length for run in layout.spans)
        used = 0
        for offsets, sizes in cut_range(tuple(local), start, start + len(fragment)):
            values = fragment[used : used + prod(sizes)].view(sizes)
            used += prod(sizes)
            self.boxes += _by_run(offsets, values, layout)

    def size(self) -> torch.Size:
        """The whole tensor's."""
        return self.shape

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        properties = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                MetadataIndex(name, chunk.offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, self.shape),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(box.offsets), box.values.shape) for box in self.boxes]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return next(box.values for box in self.boxes if box.offsets == tuple(index.offset))


def _by_run(offsets: tuple[int, ...], values: Tensor, layout: ShardSpec) -> list[Box]:
    """A box of the local parameter as boxes of the whole one, one for each run that it meets."""
    if not offsets:
        return [Box(offsets, values)]
    dim, boxes = layout.dim, []
    begin, end = offsets[dim], offsets[dim] + values.shape[dim]
    for run in layout.spans:
        low, high = max(begin, run.local_start), min(end, run.local_start + run.length)
        if low < high:
            whole = (*offsets[:dim], run.whole_start + low - run.local_start, *offsets[dim + 1 :])
            boxes.append(Box(whole, values.narrow(dim, low - begin, high - low)))
    return boxes
