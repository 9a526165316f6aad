"""The mask as all layers share it: its bounds by rows and by keys, and the order of work."""

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
    equal. first_query, last_query: int32 [B, T], the transpose: queries first_query <= i < last_query see
    key j. row_schedule, key_schedule: int32 [B, runs, 16, 4], for each batch row its runs of 128 rows or keys
    in descending order of work. Entry 0 is the run's number; entry n + i is the i-th of the run's n equal
    parts (n = 1, 2, 4, 8): the minimum and maximum of their intervals' starts, then of their ends, empty
    intervals ignored.
    """

    row_start: Tensor
    row_end: Tensor
    first_query: Tensor
    last_query: Tensor
    row_schedule: Tensor
    key_schedule: Tensor


def prepare(
    row_end: Tensor, last_query: Tensor | None = None, num_keys: int | None = None, *, check: bool = False
) -> Prepared:
    """Derive the bounds by rows and by keys, and the schedule of a batch: O(S) memory, no synchronization
    with the device.

    row_end: int32 [B, S]; last_query: int32 [B, T], or None where every query sees the keys from 0 on; then
    num_keys is T, by default S. The backward pass needs row_end to be non-decreasing along S, as packing
    makes it; the forward pass does not. `check=True` validates the contents, which synchronizes with the
    device, and raises ValueError with the first value that is outside 0 .. T (of last_query, 0 .. S) or
    smaller than the one before it.
    """
    bounds = {"row_end": row_end} | ({} if last_query is None else {"last_query": last_query})
    for name, bound in bounds.items():
        if bound.dtype != torch.int32 or bound.ndim != 2:
            raise ValueError(
                f"{name} must be int32 of shape (batch, seq), got {bound.dtype} of {list(bound.shape)}"
            )
    num_batch, num_rows = row_end.shape
    if last_query is None:
        num_keys = num_rows if num_keys is None else num_keys
        last_query = row_end.new_full((num_batch, num_keys), num_rows)
    num_keys = last_query.shape[1]
    if last_query.shape[0] != num_batch or last_query.device != row_end.device:
        raise ValueError(
            f"row_end {list(row_end.shape)} on {row_end.device} and last_query {list(last_query.shape)} on "
            f"{last_query.device} must have one batch and one device"
        )
    if check:
        _check("row_end", row_end, num_keys)
        _check("last_query", last_query, num_rows)
    row_end, last_query = row_end.clamp(max=num_keys).contiguous(), last_query.clamp(max=num_rows)
    rows = row_starts(last_query, num_rows), row_end
    keys = first_queries(row_end, num_keys), last_query.contiguous()
    return Prepared(*rows, *keys, _schedule(*rows), _schedule(*keys))


def row_starts(last_query: Tensor, num_rows: int) -> Tensor:
    """int32 [B, S]: the first key that each row sees, where last_query does not decrease along T."""
    row = torch.arange(num_rows, dtype=torch.int32, device=last_query.device).repeat(len(last_query), 1)
    return torch.searchsorted(last_query.contiguous(), row, right=True, out_int32=True)


def first_queries(row_end: Tensor, num_keys: int) -> Tensor:
    """int32 [B, T]: the first row that sees each key, where row_end does not decrease along S."""
    key = torch.arange(num_keys, dtype=torch.int32, device=row_end.device).repeat(len(row_end), 1)
    return torch.searchsorted(row_end.contiguous(), key, right=True, out_int32=True)


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


def _check(name: str, bound: Tensor, limit: int) -> None:
    outside = ((bound < 0) | (bound > limit)).nonzero()
    falling = (bound.diff(dim=1) < 0).nonzero()
    if len(outside):
        b, i = outside[0].tolist()
        raise ValueError(f"{name}[{b}, {i}] is {bound[b, i]}, outside 0 .. {limit}")
    if len(falling):
        b, i = falling[0].tolist()
        raise ValueError(
            f"{name}[{b}, {i + 1}] is {bound[b, i + 1]}, less than {bound[b, i]} before it; "
            "it must not decrease along the sequence"
        )
