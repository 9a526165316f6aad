"""PyTorch's scaled_dot_product_attention with a dense mask: the reference, and the default on CPUs."""

import torch
import torch.nn.functional as F
from torch import Tensor

from megafusion.sequence.intervals import Intervals

Mask = tuple[Tensor, Tensor | None]


def unsupported_reason(device: torch.device, dtype: torch.dtype, head_dim: int, training: bool) -> str:
    return ""


def prepare(intervals: Intervals, dtype: torch.dtype, head_dim: int) -> Mask:
    """Additive mask [B, 1, S, T], 0 where visible, else -inf; and bool [B, S, 1, 1], False for a fully masked
    query, or None if there is none. The additive mask of such a query is 0: of -inf, softmax would make NaN.
    """
    hidden, not_empty = ~intervals.dense_mask, None
    if intervals.may_be_empty:
        not_empty = intervals.not_empty[..., None, None]
        hidden &= not_empty.transpose(1, 2)
    additive = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
    return additive.masked_fill_(hidden, float("-inf")), not_empty


def attend(q_BSHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, mask: Mask) -> Tensor:
    additive, not_empty = mask
    q, k, v = (x.transpose(1, 2) for x in (q_BSHK, k_BTGK, v_BTGK))
    is_grouped = q.shape[1] != k.shape[1]
    o_BHSK = F.scaled_dot_product_attention(q, k, v, attn_mask=additive, enable_gqa=is_grouped)
    o_BSHK = o_BHSK.transpose(1, 2)
    return o_BSHK if not_empty is None else o_BSHK * not_empty
