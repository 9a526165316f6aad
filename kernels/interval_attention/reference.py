"""Dense attention under the same mask, in the precision of its inputs: the tests' reference."""

import torch
from torch import Tensor


def dense_mask(row_end: Tensor, last_query: Tensor) -> Tensor:
    """bool [B, 1, S, T], True where a query sees a key. O(S x T) memory: for tests."""
    query, key = (torch.arange(x.shape[1], device=x.device) for x in (row_end, last_query))
    return ((key < row_end[..., None]) & (query[:, None] < last_query[:, None]))[:, None]


def reference_attention(
    q: Tensor, k: Tensor, v: Tensor, row_end: Tensor, last_query: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """(o [B, S, H, K], lse [B, H, S]) of `interval_attention` by its definition, in the dtype of q."""
    scale = q.shape[3] ** -0.5 if scale is None else scale
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    score_BHST = torch.einsum("bshk,bthk->bhst", q, k) * scale
    visible = dense_mask(row_end, last_query)
    not_empty = visible.any(-1, keepdim=True)
    # A fully masked row keeps finite scores here and is zeroed below, because a row of -inf would give NaN.
    score_BHST = score_BHST.masked_fill(~visible & not_empty, float("-inf"))
    o = torch.einsum("bhst,bthk->bshk", score_BHST.softmax(-1), v)
    lse = score_BHST.logsumexp(-1).masked_fill(~not_empty[..., 0], float("-inf"))
    return o * not_empty[:, 0, :, :, None], lse
