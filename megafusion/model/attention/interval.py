"""The Triton kernels of `kernels/interval_attention`: CUDA, or Triton's interpreter on a CPU."""

import torch
from torch import Tensor

from interval_attention import Prepared, check_served, prepared_attention
from interval_attention import prepare as prepare_intervals
from megafusion.sequence.intervals import Intervals


def refusal(device: torch.device, dtype: torch.dtype, head_dim: int, training: bool) -> str:
    try:
        check_served(device, dtype, head_dim)
    except ValueError as error:
        return str(error)
    return ""


def prepare(intervals: Intervals, dtype: torch.dtype, head_dim: int) -> Prepared:
    return prepare_intervals(intervals.row_start, intervals.row_end, intervals.num_keys)


def attend(q_BSHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, mask: Prepared) -> Tensor:
    return prepared_attention(q_BSHK, k_BTGK, v_BTGK, mask)
