"""The mask as block lists, the mask format of flash-attention 4."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


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


def block_lists(
    row_end: Tensor, last_query: Tensor, block_rows: int, block_keys: int
) -> tuple[BlockLists, BlockLists]:
    """The lists of blocks of rows, and those of blocks of keys; O(S x T / (block_rows x block_keys)).

    row_end int32 [B, S], non-decreasing but for fully masked rows at its end; last_query int32 [B, T], which
    may rise and fall. A row that sees a key is assumed to see its own, if there is one.
    """
    first_row, past_row, least_end, most_end = _blocks(row_end, block_rows)
    first_key, past_key, least_query, most_query = _blocks(last_query, block_keys)
    is_visited = (first_key[:, None] < most_end[..., None]) & (first_row[..., None] < most_query[:, None])
    is_full = (past_key[:, None] <= least_end[..., None]) & (past_row[..., None] <= least_query[:, None])
    by_rows = BlockLists(*_listed(is_visited & ~is_full), *_listed(is_full))
    by_keys = BlockLists(*_listed((is_visited & ~is_full).mT), *_listed(is_full.mT))
    return by_rows, by_keys


def _blocks(bound: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each block of positions: its first and past its last, and the least and largest bound in it, the
    least 0 where it extends past the end; each [B or 1, N]."""
    blocks = F.pad(bound, (0, -bound.shape[1] % block)).unflatten(1, (-1, block))
    first = torch.arange(0, blocks.shape[1] * block, block, device=bound.device)[None]
    return first, first + block, blocks.amin(2), blocks.amax(2)


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Count and indices of the chosen blocks of bool [B, N, M], as in `BlockLists`."""
    count = chosen.sum(-1, dtype=torch.int32)
    order = chosen.byte().argsort(dim=-1, descending=True, stable=True).int()
    index = order.where(torch.arange(chosen.shape[-1], device=chosen.device) < count[..., None], 0)
    return count[:, None], index[:, None]
