"""Which positions a program owns and which it visits, the mask, and loads. Shared by all kernels."""

import triton
import triton.language as tl

from interval_attention.intervals import RUN

_RUN = tl.constexpr(RUN)


@triton.jit
def locate(schedule, num_runs, section, BLOCK: tl.constexpr, HOLES: tl.constexpr):
    """(batch row, head, first position, low, inner_low, inner_high, high, gap) of this program.

    The grid is (runs x tiles of a run x section, heads / section, batch rows): the heads of a section go side
    by side, the longest runs first. The intervals of the tile's positions have the union [low, high) and the
    intersection [inner_low, inner_high); empty intervals are ignored. gap, if HOLES: none of the positions
    sees the keys from gap[0] to gap[1], and their holes are between gap[2] and gap[3].
    """
    fields: tl.constexpr = 8 if HOLES else 4
    parts: tl.constexpr = _RUN // BLOCK
    pid = tl.program_id(0)
    tile = pid // section
    head = tl.program_id(1) * section + pid % section
    b = tl.program_id(2).to(tl.int64)
    part = tile % parts
    schedule += (b * num_runs + tile // parts) * 16 * fields
    first = tl.load(schedule) * _RUN + part * BLOCK
    schedule += fields * (parts + part)
    high = tl.load(schedule + 3)  # 0 if no position of the tile sees or is seen
    low, inner_high = tl.minimum(tl.load(schedule), high), tl.minimum(tl.load(schedule + 2), high)
    gap = (high, high, high, high)
    if HOLES:
        gap = (tl.load(schedule + 4), tl.load(schedule + 5), tl.load(schedule + 6), tl.load(schedule + 7))
    return b, head, first, low, tl.load(schedule + 1), inner_high, high, gap


@triton.jit
def steps(
    part: tl.constexpr, low, inner_low, inner_high, high, gap,
    BRANCH: tl.constexpr, HOLES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(first position, number, turn, jump) of a loop's steps: all if BRANCH; else, in three loops, those over
    left edges, those between the edges, and those over right edges. They are the same steps.

    If HOLES, step number `turn` and those behind it begin `jump` later, past the keys that no position sees:
    behind the step before, which may reach over a small gap, so that no key is visited twice.
    """
    if HOLES:
        inner_high = tl.minimum(inner_high, gap[2])
    full_low = low + tl.cdiv(inner_low - low, BLOCK) * BLOCK
    full_high = full_low + tl.maximum(inner_high - full_low, 0) // BLOCK * BLOCK
    if not BRANCH and part == 0:
        num_steps = tl.cdiv(tl.minimum(full_low, high) - low, BLOCK)
        return low, num_steps, num_steps, 0
    elif not BRANCH and part == 1:
        num_steps = (full_high - full_low) // BLOCK
        return full_low, num_steps, num_steps, 0
    else:
        begin = low if BRANCH else full_high
        turn = tl.cdiv(tl.maximum(high - begin, 0), BLOCK)
        if HOLES:
            turn = tl.cdiv(tl.maximum(gap[0] - begin, 0), BLOCK)
            jump = tl.maximum(gap[1] - begin - turn * BLOCK, 0)
            return begin, turn + tl.cdiv(tl.maximum(high - begin - jump - turn * BLOCK, 0), BLOCK), turn, jump
        else:
            return begin, turn, turn, 0


@triton.jit
def hole_bounds(holes, b, num_rows, rows, HOLES: tl.constexpr):
    """The addresses of the first and past the last key of each row's hole, of holes [2, B, S]."""
    if HOLES:
        start = holes + b * num_rows + rows
        return start, start + tl.num_programs(2).to(tl.int64) * num_rows
    else:
        return 0, 0


@triton.jit
def at_edges(start, end, holes, inside, part: tl.constexpr, BRANCH: tl.constexpr, HOLES: tl.constexpr):
    """The intervals [tile] and holes for `mask_scores`: addresses if BRANCH, else, at edges, their values."""
    if BRANCH or part == 1:
        return start, end, holes
    else:
        if HOLES:
            holes = (tl.load(holes[0], mask=inside, other=0), tl.load(holes[1], mask=inside, other=0))
        return tl.load(start, mask=inside, other=0), tl.load(end, mask=inside, other=0), holes


@triton.jit
def mask_scores(
    s, start, end, holes, inside, first, inner_low, inner_high, gap,
    part: tl.constexpr, BRANCH: tl.constexpr, HOLES: tl.constexpr,
):  # fmt: skip
    """Set s [tile, step] to -inf outside the intervals of the tile's positions, and in their holes; no work
    between edges.

    Loads in a branch keep the compiler from computing the mask in every step.
    """
    step = tl.arange(0, s.shape[1])[None, :]
    if BRANCH:
        if first < inner_low:
            s = tl.where(step >= (tl.load(start, mask=inside, other=0) - first)[:, None], s, float("-inf"))
        if first + s.shape[1] > inner_high:
            s = tl.where(step < (tl.load(end, mask=inside, other=0) - first)[:, None], s, float("-inf"))
        if HOLES:  # noqa: SIM102 - a constant of the compiler
            if (first + s.shape[1] > gap[2]) & (first < gap[3]):
                before = step < (tl.load(holes[0], mask=inside, other=0) - first)[:, None]
                behind = step >= (tl.load(holes[1], mask=inside, other=0) - first)[:, None]
                s = tl.where(before | behind, s, float("-inf"))
    elif part != 1:
        seen = (step >= (start - first)[:, None]) & (step < (end - first)[:, None])
        if HOLES:
            seen &= (step < (holes[0] - first)[:, None]) | (step >= (holes[1] - first)[:, None])
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
