"""The mask as all layers share it: two integers per row, their transpose, and the order of work."""

from typing import NamedTuple

import torch
from torch import Tensor

# Rows (or keys) that the schedule moves together; a multiple of the kernels' tiles.
RUN = 128


class Prepared(NamedTuple):
    """A batch's mask, made once by `prepare` and read by all layers.

    row_start, row_end: int32 [B, S]; query i sees the keys row_start <= j < row_end, none where they are
    equal. first_row, last_row: int32 [B, T], the transpose: rows first_row <= i < last_row see key j
    (except fully masked rows). row_order, key_order: int32 [B x runs], runs of 128 rows or keys in descending
    order of work; run r is the positions from r % runs x 128 of batch row r // runs.
    """

    row_start: Tensor
    row_end: Tensor
    first_row: Tensor
    last_row: Tensor
    row_order: Tensor
    key_order: Tensor


def prepare(
    row_start: Tensor, row_end: Tensor, num_keys: int | None = None, *, check: bool = False
) -> Prepared:
    """Derive the column bounds and the schedule of a batch: O(S) memory, no synchronization with the device.

    row_start, row_end: int32 [B, S]; num_keys T is S by default. The backward pass needs both to be
    non-decreasing along S, as packing makes them; the forward pass does not. `check=True` validates the
    contents, which synchronizes with the device, and raises ValueError with the first value that is outside
    0 .. T or smaller than the one before it.
    """
    for name, bound in (("row_start", row_start), ("row_end", row_end)):
        if bound.dtype != torch.int32 or bound.ndim != 2:
            raise ValueError(
                f"{name} must be int32 of shape (batch, seq), got {bound.dtype} of {list(bound.shape)}"
            )
    if row_start.shape != row_end.shape or row_start.device != row_end.device:
        raise ValueError(
            f"row_start {list(row_start.shape)} on {row_start.device} and row_end {list(row_end.shape)} on "
            f"{row_end.device} must have one shape and one device"
        )
    num_rows = row_start.shape[1]
    num_keys = num_rows if num_keys is None else num_keys
    if check:
        _check(row_start, row_end, num_keys)
    row_start, row_end = row_start.contiguous(), row_end.contiguous()
    first_row, last_row = transpose(row_start, row_end, num_keys)
    row_order, key_order = _longest_first(row_start, row_end), _longest_first(first_row, last_row)
    return Prepared(row_start, row_end, first_row, last_row, row_order, key_order)


def transpose(row_start: Tensor, row_end: Tensor, num_keys: int) -> tuple[Tensor, Tensor]:
    """(first_row, last_row) int32 [B, T]: the rows that see a key, of bounds that do not decrease along S."""
    key = torch.arange(num_keys, dtype=torch.int32, device=row_start.device).repeat(len(row_start), 1)
    first_row = torch.searchsorted(row_end, key, right=True, out_int32=True)
    last_row = torch.searchsorted(row_start, key, right=True, out_int32=True)
    return first_row, last_row


def _longest_first(start: Tensor, end: Tensor) -> Tensor:
    """Runs of 128 positions in descending order of the length of the union of their intervals."""
    size = start.shape[1]
    last = torch.arange(RUN - 1, size + RUN - 1, RUN, device=start.device).clamp_(max=size - 1)
    length = end[:, last] - start[:, ::RUN]
    return length.flatten().argsort(descending=True, stable=True).int()


def _check(row_start: Tensor, row_end: Tensor, num_keys: int) -> None:
    for name, bound in (("row_start", row_start), ("row_end", row_end)):
        outside = ((bound < 0) | (bound > num_keys)).nonzero()
        falling = (bound.diff(dim=1) < 0).nonzero()
        if len(outside):
            b, i = outside[0].tolist()
            raise ValueError(f"{name}[{b}, {i}] is {bound[b, i]}, outside 0 .. {num_keys}")
        if len(falling):
            b, i = falling[0].tolist()
            raise ValueError(
                f"{name}[{b}, {i + 1}] is {bound[b, i + 1]}, less than {bound[b, i]} before it; "
                "it must not decrease along the sequence"
            )
