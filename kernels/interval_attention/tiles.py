"""Which positions a program owns and which it visits, the mask, and loads. Shared by all kernels."""

import triton
import triton.language as tl

from interval_attention.intervals import RUN

_RUN = tl.constexpr(RUN)


@triton.jit
def locate(schedule, num_runs, section, BLOCK: tl.constexpr):
    """(batch row, head, first position, low, inner_low, inner_high, high) of this program.

    The grid is (runs x tiles of a run x section, heads / section, batch rows): the heads of a section go side
    by side, the longest runs first. The intervals of the tile's positions have the union [low, high) and the
    intersection [inner_low, inner_high); empty intervals are ignored.
    """
    parts: tl.constexpr = _RUN // BLOCK
    pid = tl.program_id(0)
    tile = pid // section
    head = tl.program_id(1) * section + pid % section
    b = tl.program_id(2).to(tl.int64)
    part = tile % parts
    schedule += (b * num_runs + tile // parts) * 64
    first = tl.load(schedule) * _RUN + part * BLOCK
    schedule += 4 * (parts + part)
    high = tl.load(schedule + 3)  # 0 if no position of the tile sees or is seen
    low, inner_high = tl.minimum(tl.load(schedule), high), tl.minimum(tl.load(schedule + 2), high)
    return b, head, first, low, tl.load(schedule + 1), inner_high, high


@triton.jit
def steps(part: tl.constexpr, low, inner_low, inner_high, high, BRANCH: tl.constexpr, BLOCK: tl.constexpr):
    """(first position, number) of a loop's steps: all if BRANCH; else, in three loops, those over left edges,
    those between the edges, and those over right edges. They are the same steps."""
    full_low = low + tl.cdiv(inner_low - low, BLOCK) * BLOCK
    full_high = full_low + tl.maximum(inner_high - full_low, 0) // BLOCK * BLOCK
    if BRANCH:
        return low, tl.cdiv(high - low, BLOCK)
    elif part == 0:
        return low, tl.cdiv(tl.minimum(full_low, high) - low, BLOCK)
    elif part == 1:
        return full_low, (full_high - full_low) // BLOCK
    else:
        return full_high, tl.cdiv(tl.maximum(high - full_high, 0), BLOCK)


@triton.jit
def at_edges(start, end, inside, part: tl.constexpr, BRANCH: tl.constexpr):
    """The intervals [tile] for `mask_scores`: their addresses if BRANCH, else, at edges, their values."""
    if BRANCH or part == 1:
        return start, end
    else:
        return tl.load(start, mask=inside, other=0), tl.load(end, mask=inside, other=0)


@triton.jit
def mask_scores(
    s, start, end, inside, first, inner_low, inner_high, part: tl.constexpr, BRANCH: tl.constexpr
):
    """Set s [tile, step] to -inf outside the intervals of the tile's positions; no work between edges.

    Loads in a branch keep the compiler from computing the mask in every step.
    """
    step = tl.arange(0, s.shape[1])[None, :]
    if BRANCH:
        if first < inner_low:
            s = tl.where(step >= (tl.load(start, mask=inside, other=0) - first)[:, None], s, float("-inf"))
        if first + s.shape[1] > inner_high:
            s = tl.where(step < (tl.load(end, mask=inside, other=0) - first)[:, None], s, float("-inf"))
    elif part != 1:
        seen = (step >= (start - first)[:, None]) & (step < (end - first)[:, None])
        s = tl.where(seen, s, float("-inf"))
    return s


@triton.jit
def at_head(x, b, head, stride_b, stride_h, TMA: tl.constexpr):
    """The address of one head of one batch row; a TMA descriptor covers all and is returned as it is."""
    if TMA:
        return x
    else:
        return x + b * stride_b + head.to(tl.int64) * stride_h


@triton.jit
def load_tile(
    x, b, head, first, stride, stride_d, high,
    MASKED: tl.constexpr, TMA: tl.constexpr, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Load positions first .. first + BLOCK of one head, [BLOCK, HEAD_DIM], from the result of `at_head`.

    If MASKED, zeros from `high` on; with TMA, zeros past the tensor's end.
    """
    if TMA:
        return x.load([b.to(tl.int32), first, head.to(tl.int32), 0]).reshape([BLOCK, HEAD_DIM])
    else:
        at = x + first.to(tl.int64) * stride + tl.arange(0, BLOCK)[:, None] * stride
        at += tl.arange(0, HEAD_DIM)[None, :] * stride_d
        if MASKED:
            return tl.load(at, mask=(first + tl.arange(0, BLOCK))[:, None] < high, other=0.0)
        else:
            return tl.load(at)
