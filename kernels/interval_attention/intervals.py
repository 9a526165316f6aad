"""The mask as all layers share it: two integers per row, their transpose, and the order of work."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Rows (or keys) that the schedule moves together; tiles are a run, its halves, quarters or eighths.
RUN = 128
# Larger than any position: the neutral element of minima.
FAR = 2**31 - 1


class Prepared(NamedTuple):
    """A batch's mask, made once by `prepare` and read by all layers.

    row_start, row_end: int32 [B, S]; query i sees the keys row_start <= j < row_end, none where they are
    equal. first_row, last_row: int32 [B, T], the transpose: rows first_row <= i < last_row see key j.
    row_schedule, key_schedule: int32 [B, runs, 16, 4], for each batch row its runs of 128 rows or keys in
    descending order of work. Entry 0 is the run's number; entry n + i is the i-th of the run's n equal parts
    (n = 1, 2, 4, 8): the minimum and maximum of their intervals' starts, then of their ends, empty intervals
    ignored.
    """

    row_start: Tensor
    row_end: Tensor
    first_row: Tensor
    last_row: Tensor
    row_schedule: Tensor
    key_schedule: Tensor


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
    rows = row_start.clamp(min=0).contiguous(), row_end.clamp(max=num_keys).contiguous()
    keys = transpose(*rows, num_keys)
    return Prepared(*rows, *keys, _schedule(*rows), _schedule(*keys))


def transpose(row_start: Tensor, row_end: Tensor, num_keys: int) -> tuple[Tensor, Tensor]:
    """(first_row, last_row) int32 [B, T]: the rows that see a key, of bounds that do not decrease along S."""
    key = torch.arange(num_keys, dtype=torch.int32, device=row_start.device).repeat(len(row_start), 1)
    first_row = torch.searchsorted(row_end, key, right=True, out_int32=True)
    last_row = torch.searchsorted(row_start, key, right=True, out_int32=True)
    return first_row, last_row


def _schedule(start: Tensor, end: Tensor) -> Tensor:
    """The bounds of each run of 128 intervals and of its parts, as in `Prepared`; longest union first."""
    num_runs = -(-start.shape[1] // RUN)
    start, end = (
        F.pad(x, (0, num_runs * RUN - x.shape[1])).unflatten(1, (num_runs, RUN)) for x in (start, end)
    )
    empty = end <= start
    # Maxima as minima of negative values.
    fields = [y for x in (start, end) for y in (x.masked_fill(empty, FAR), -x.masked_fill(empty, 0))]
    parts = [torch.stack(fields, 3).unflatten(2, (n, -1)).amin(3) for n in (1, 2, 4, 8)]
    bounds = torch.cat(parts, 2)
    bounds[..., 1::2].neg_()
    order = (bounds[:, :, 0, 3] - bounds[:, :, 0, 0]).argsort(dim=1, descending=True, stable=True)
    order = order[:, :, None, None].expand(-1, -1, 1, 4)
    return torch.cat([order.int(), bounds.take_along_dim(order[..., :1], 1)], 2)


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
