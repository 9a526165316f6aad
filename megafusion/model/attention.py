"""attention(q, k, v, intervals): one signature for every backend."""

from collections.abc import Callable
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from megafusion.sequence.intervals import Intervals

Backend = Literal["sdpa"]
Attention = Callable[[Tensor, Tensor, Tensor, Intervals], Tensor]


def sdpa(q_BSHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, intervals: Intervals) -> Tensor:
    """PyTorch's attention with the dense mask of the intervals: the reference, and the CPU's default.

    q [B, S, H, K]; k, v [B, T, G, K] with G dividing H (grouped-query) and T = intervals.num_keys;
    returns [B, S, H, K]. A row that sees no key gives zeros.
    """
    q, k, v = (x.transpose(1, 2) for x in (q_BSHK, k_BTGK, v_BTGK))
    mask = intervals.additive_mask.to(q.dtype)
    grouped = q.shape[1] != k.shape[1]
    o_BSHK = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped).transpose(1, 2)
    return o_BSHK * intervals.some_visible[..., None, None] if intervals.may_be_empty else o_BSHK


BACKENDS: dict[str, Attention] = {"sdpa": sdpa}
