"""The Triton kernels of `kernels/interval_attention`: CUDA, or Triton's interpreter on a CPU."""

import torch
from torch import Tensor

import interval_attention
from megafusion.sequence.intervals import Intervals


def unsupported_reason(device: torch.device, dtype: torch.dtype, head_dim: int, training: bool) -> str:
    interval_attention.check_supported(device, dtype, head_dim)
    return ""


def prepare(intervals: Intervals, dtype: torch.dtype, head_dim: int) -> interval_attention.Prepared:
    bounds = intervals.row_end, intervals.last_query, intervals.num_keys
    return interval_attention.prepare(*bounds, has_holes=intervals.has_holes)


def attend(q_BSHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, mask: interval_attention.Prepared) -> Tensor:
    out = interval_attention.prepared_attention(q_BSHK, k_BTGK, v_BTGK, mask)
    assert isinstance(out, Tensor)  # without the log-sum-exp
    return out
