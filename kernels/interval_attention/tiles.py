"""The keys or rows that a tile visits, and the steps that need the mask. Shared by all kernels."""

import triton
import triton.language as tl

# Larger than any position: the neutral element of minima.
FAR = tl.constexpr(2**31 - 1)


@triton.jit
def locate(order, num_runs, num_heads, RUN: tl.constexpr, BLOCK: tl.constexpr):
    """(batch row, head, first position) of this program: longest runs first, heads side by side."""
    parts: tl.constexpr = RUN // BLOCK
    pid = tl.program_id(0)
    head = pid % num_heads
    part = pid // num_heads % parts
    run = tl.load(order + pid // num_heads // parts)
    return (run // num_runs).to(tl.int64), head, run % num_runs * RUN + part * BLOCK


@triton.jit
def load_rows(row_start, row_end, rows, num_rows, num_keys):
    """Intervals [BLOCK] of some rows, clamped to 0 .. num_keys; empty past the last row."""
    inside = rows < num_rows
    start = tl.load(row_start + rows, mask=inside, other=0)
    end = tl.load(row_end + rows, mask=inside, other=0)
    return tl.maximum(start, 0), tl.minimum(end, num_keys)


@triton.jit
def bounds(start, end):
    """The union of some rows' intervals, [low, high), and their intersection, [inner_low, inner_high).

    Empty intervals are ignored, because their rows' results are zeroed in the end.
    """
    empty = end <= start
    low = tl.min(tl.where(empty, FAR, start))
    inner_low = tl.max(tl.where(empty, 0, start))
    inner_high = tl.min(tl.where(empty, FAR, end))
    high = tl.max(tl.where(empty, 0, end))
    return tl.minimum(low, high), inner_low, tl.minimum(inner_high, high), high


@triton.jit
def steps(low, inner_low, inner_high, high, BLOCK: tl.constexpr):
    """Split [low, high) into steps of BLOCK: edge steps, which need the mask, and full steps, which do not.

    Steps count from low, so a tile within one document has no edge on the left. Returns the begin and end of
    the full steps, the number of edge steps on the left, and the number of all edge steps.
    """
    full_low = low + tl.cdiv(inner_low - low, BLOCK) * BLOCK
    full_high = full_low + tl.maximum(inner_high - full_low, 0) // BLOCK * BLOCK
    num_left = tl.cdiv(tl.maximum(tl.minimum(full_low, high) - low, 0), BLOCK)
    num_right = tl.cdiv(tl.maximum(high - full_high, 0), BLOCK)
    return full_low, full_high, num_left, num_left + num_right


@triton.jit
def edge_step(i, low, full_high, num_left, BLOCK: tl.constexpr):
    """The first position of the i-th edge step: those on the left come first, then those on the right."""
    return tl.where(i < num_left, low + i * BLOCK, full_high + (i - num_left) * BLOCK)


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
