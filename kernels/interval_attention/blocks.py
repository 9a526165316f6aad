"""Intervals as block lists, the mask format of flash-attention 4."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from interval_attention.intervals import FAR as LARGEST

FAR = tl.constexpr(LARGEST)


class BlockLists(NamedTuple):
    """For each block of positions, the visited blocks of the other side, in ascending order.

    N blocks of positions, M of the other side: counts int32 [B, 1, N], indices int32 [B, 1, N, M] (zeros
    after the count). `mask` blocks need the mask; in `full` blocks every pair is visible. A block that
    extends past either end is a `mask` block.
    """

    mask_count: Tensor
    mask_index: Tensor
    full_count: Tensor
    full_index: Tensor


@triton.jit
def block_lists_kernel(
    start, end, clamped_start, clamped_end, mask_count, mask_index, full_count, full_index,
    num_positions, num_others, num_other_blocks,
    BLOCK: tl.constexpr, OTHER: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program per block of positions: its visited blocks are one range, its full blocks a subrange."""
    num_blocks = tl.cdiv(num_positions, BLOCK)
    pid = tl.program_id(0)
    block = pid % num_blocks
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = at < num_positions
    from64 = (pid // num_blocks).to(tl.int64) * num_positions
    s = tl.load(start + from64 + at, mask=inside, other=0)
    e = tl.load(end + from64 + at, mask=inside, other=0)
    s = tl.minimum(tl.maximum(s, 0), num_others - 1)
    e = tl.maximum(tl.minimum(e, num_others), s + 1)
    at_clamped = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(clamped_start + at_clamped, tl.where(inside, s, num_others))
    tl.store(clamped_end + at_clamped, tl.where(inside, e, num_others))

    first = tl.min(tl.where(inside, s, FAR)) // OTHER
    last = tl.cdiv(tl.max(tl.where(inside, e, 0)), OTHER)
    full_first = tl.cdiv(tl.max(tl.where(inside, s, 0)), OTHER)
    num_full = tl.min(tl.where(inside, e, FAR)) // OTHER - full_first
    num_full = tl.where((block + 1) * BLOCK <= num_positions, tl.maximum(num_full, 0), 0)
    num_left = tl.where(num_full > 0, full_first - first, 0)
    num_masked = last - first - num_full
    tl.store(mask_count + pid, num_masked)
    tl.store(full_count + pid, num_full)
    mask_index += pid.to(tl.int64) * num_other_blocks
    full_index += pid.to(tl.int64) * num_other_blocks
    for chunk in range(0, num_other_blocks, CHUNK):
        i = chunk + tl.arange(0, CHUNK)
        masked = first + i + tl.where(i < num_left, 0, num_full)
        tl.store(mask_index + i, tl.where(i < num_masked, masked, 0), mask=i < num_other_blocks)
        full = full_first + i
        tl.store(full_index + i, tl.where(i < num_full, full, 0), mask=i < num_other_blocks)


def block_lists(
    start: Tensor, end: Tensor, num_others: int, block: int, other_block: int
) -> tuple[BlockLists, Tensor, Tensor]:
    """Block lists of intervals int32 [B, S] over `num_others` positions, and the clamped intervals.

    The returned intervals, int32 [B, N x block], are clamped to 0 .. num_others and never empty, because
    flash-attention divides by a row's sum: an empty interval becomes its own position, and the caller zeroes
    that row's result. Past S they are empty. `block` and `other_block` must be powers of two.
    """
    num_batch, num_positions = start.shape
    num_blocks, num_other_blocks = triton.cdiv(num_positions, block), triton.cdiv(num_others, other_block)
    counts = start.new_empty((2, num_batch, 1, num_blocks))
    indices = start.new_empty((2, num_batch, 1, num_blocks, num_other_blocks))
    clamped = start.new_empty((2, num_batch, num_blocks * block))
    with torch.cuda.device_of(start):
        block_lists_kernel[(num_batch * num_blocks,)](
            start.contiguous(), end.contiguous(), *clamped, counts[0], indices[0], counts[1], indices[1],
            num_positions, num_others, num_other_blocks, BLOCK=block, OTHER=other_block, CHUNK=64,
        )  # fmt: skip
    return BlockLists(counts[0], indices[0], counts[1], indices[1]), clamped[0], clamped[1]
