"""PyTorch's FlexAttention with the intervals as a BlockMask; compiled on CUDA."""

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from megafusion.sequence.intervals import Intervals

compiled_flex_attention = torch.compile(flex_attention)  # compiles at its first call


def unsupported_reason(device: torch.device, dtype: torch.dtype, head_dim: int, training: bool) -> str:
    return "PyTorch has no backward pass for it on CPUs" if training and device.type == "cpu" else ""


def prepare(intervals: Intervals, dtype: torch.dtype, head_dim: int) -> BlockMask:
    """Evaluates all S x T pairs."""
    row_end, last_query = intervals.row_end, intervals.last_query

    def is_visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        is_before = key < row_end[row, query]
        return is_before if last_query is None else is_before & (query < last_query[row, key])

    (num_rows, length), device = row_end.shape, row_end.device
    return create_block_mask(is_visible, num_rows, None, length, intervals.num_keys, device=device)


def attend(q_BSHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, mask: BlockMask) -> Tensor:
    attention = compiled_flex_attention if q_BSHK.is_cuda else flex_attention
    q, k, v = (x.transpose(1, 2) for x in (q_BSHK, k_BTGK, v_BTGK))
    return attention(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)
