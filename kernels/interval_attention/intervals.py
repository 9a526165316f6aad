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
    key j. holes: int32 [2, B, S] or None, the first and past the last key between start and end that a row
    does not see; the largest integer and 0 where it sees all.
    row_schedule, key_schedule: int32 [B, runs, 16, 4], for each batch row its runs of 128 rows or keys
    in descending order of work. Entry 0 is the run's number; entry n + i is the i-th of the run's n equal
    parts (n = 1, 2, 4, 8): the minimum and maximum of their intervals' starts, then of their ends, empty
    intervals ignored. With holes, row_schedule is [B, runs, 16, 8], as `_hole_fields` says.
    """

    row_start: Tensor
    row_end: Tensor
    first_query: Tensor
    last_query: Tensor
    holes: Tensor | None
    row_schedule: Tensor
    key_schedule: Tensor


def prepare(
    row_end: Tensor,
    last_query: Tensor | None = None,
    num_keys: int | None = None,
    *,
    has_holes: bool = False,
    check: bool = False,
) -> Prepared:
    """Derive the bounds by rows and by keys, and the schedule of a batch: O(S) memory, no synchronization
    with the device.

    row_end: int32 [B, S]; last_query: int32 [B, T], or None where every query sees the keys from 0 on; then
    num_keys is T, by default S. The backward pass needs row_end to be non-decreasing along S, as packing
    makes it; the forward pass does not. last_query must not decrease along T, unless has_holes: then S = T,
    and rows may have a hole each, as noised images at their document's end do (see `_hole_bounds`).
    `check=True` validates the contents, which synchronizes with the device, and raises ValueError with the
    first value that is outside 0 .. T (of last_query, 0 .. S) or smaller than the one before it.
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
        _check("last_query", last_query, num_rows, may_fall=has_holes)
    row_end, last_query = row_end.clamp(max=num_keys).contiguous(), last_query.clamp(max=num_rows)
    document_end = last_query.cummax(1).values if has_holes else last_query
    rows = row_starts(document_end, num_rows), row_end
    keys = first_queries(row_end, num_keys), last_query.contiguous()
    holes = _hole_bounds(*rows, *keys, document_end) if has_holes else None
    if check and holes is not None:
        _check_holes(rows, keys, holes)
    return Prepared(*rows, *keys, holes, _schedule(*rows, holes), _schedule(*keys))


def row_starts(last_query: Tensor, num_rows: int) -> Tensor:
    """int32 [B, S]: the first key that each row sees, where last_query does not decrease along T."""
    row = torch.arange(num_rows, dtype=torch.int32, device=last_query.device).repeat(len(last_query), 1)
    return torch.searchsorted(last_query.contiguous(), row, right=True, out_int32=True)


def first_queries(row_end: Tensor, num_keys: int) -> Tensor:
    """int32 [B, T]: the first row that sees each key, where row_end does not decrease along S."""
    key = torch.arange(num_keys, dtype=torch.int32, device=row_end.device).repeat(len(row_end), 1)
    return torch.searchsorted(row_end.contiguous(), key, right=True, out_int32=True)


def _hole_bounds(
    row_start: Tensor, row_end: Tensor, first_query: Tensor, last_query: Tensor, document_end: Tensor
) -> Tensor:
    """`Prepared.holes` of rows that see the keys from row_start on, then their own group's; O(S log S).

    Right where within a document, up to the first key that its own group alone sees, last_query does not
    rise, and each row's second run of keys is its own group. document_end: the running maximum of last_query.
    """
    row = torch.arange(row_end.shape[1], dtype=torch.int32, device=row_end.device).repeat(len(row_end), 1)
    before_group = last_query.gather(1, (first_query - 1).clamp(min=0).long())
    has_hole = (first_query > row_start) & (before_group <= row)
    # Documents in order, and in each the keys in the order in which queries cease to see them.
    rank = (document_end - last_query).long().masked_fill_(last_query == row_end, FAR)
    document = document_end.long() << 32
    wanted = document + (document_end - row)
    hole_start = torch.searchsorted(document + rank, wanted, out_int32=True)
    return torch.stack([hole_start.where(has_hole, FAR), first_query.where(has_hole, 0)])


def _hole_fields(start: Tensor, end: Tensor, holes: Tensor) -> Tensor:
    """int32 [..., 4] of tiles of rows, [..., rows]: two bounds between which no row of the tile sees a key;
    the minimum of the holes' starts, and the maximum of their ends."""
    hole_start, hole_end = holes
    past = hole_end.where(hole_end > 0, end.amax(-1, keepdim=True)).amin(-1, keepdim=True)
    # Where the keys end that a row sees before `past`; an empty row, and one of a later document, has none.
    seen = torch.minimum(hole_start, end).minimum(past).where((start < past) & (start < end), 0)
    return torch.stack([seen.amax(-1), past[..., 0], hole_start.amin(-1), hole_end.amax(-1)], -1)


def _schedule(start: Tensor, end: Tensor, holes: Tensor | None = None) -> Tensor:
    """The bounds of each run of 128 intervals and of its parts, as in `Prepared`; longest first."""
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
    work = bounds[:, :, 0, 3] - bounds[:, :, 0, 0]
    if holes is not None:
        padding = 0, num_runs * RUN - holes.shape[2]
        # A row past the last has no hole.
        holes = torch.stack([F.pad(holes[0], padding, value=FAR), F.pad(holes[1], padding)])
        rows = start, end, holes.unflatten(2, (num_runs, RUN))
        parts = [_hole_fields(*(x.unflatten(-1, (n, -1)) for x in rows)) for n in (1, 2, 4, 8)]
        bounds = torch.cat([bounds, torch.cat(parts, 2)], 3)
        work = work - (bounds[:, :, 0, 5] - bounds[:, :, 0, 4])
    order = work.argsort(dim=1, descending=True, stable=True)
    order = order[:, :, None, None].expand(-1, -1, 1, bounds.shape[3])
    return torch.cat([order.int(), bounds.take_along_dim(order[..., :1], 1)], 2)


def _check_holes(rows: tuple[Tensor, Tensor], keys: tuple[Tensor, Tensor], holes: Tensor) -> None:
    """Raise ValueError if rows and keys do not have as many visible pairs, as they do with a hole a row."""
    by_rows, by_keys = ((end - start).clamp(min=0) for start, end in (rows, keys))
    by_rows = by_rows - (holes[1] - holes[0]).clamp(min=0)
    for b in (by_rows.sum(1) != by_keys.sum(1)).nonzero()[:1, 0].tolist():
        raise ValueError(
            f"row {b}: {int(by_keys[b].sum())} visible pairs by row_end and last_query, but "
            f"{int(by_rows[b].sum())} with one hole a row, whose second run is the row's own group"
        )


def _check(name: str, bound: Tensor, limit: int, may_fall: bool = False) -> None:
    outside = ((bound < 0) | (bound > limit)).nonzero()
    falling = (bound.diff(dim=1) < 0).nonzero()[: 0 if may_fall else None]
    if len(outside):
        b, i = outside[0].tolist()
        raise ValueError(f"{name}[{b}, {i}] is {bound[b, i]}, outside 0 .. {limit}")
    if len(falling):
        b, i = falling[0].tolist()
        raise ValueError(
            f"{name}[{b}, {i + 1}] is {bound[b, i + 1]}, less than {bound[b, i]} before it; "
            "it must not decrease along the sequence"
        )
