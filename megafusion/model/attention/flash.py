"""flash-attention 4 with block lists, or flash-attention 2 for rows of text only: CUDA."""

import torch
from torch import Tensor

from interval_attention.flash import FlashPrepared, check_flash, flash_attention, flash_package, flash_prepare
from megafusion.errors import UserError
from megafusion.sequence.intervals import Intervals

Mask = tuple[FlashPrepared, Tensor | None]


def unsupported_reason(device: torch.device, dtype: torch.dtype, head_dim: int, training: bool) -> str:
    check_flash(device, dtype, head_dim)
    return ""


def prepare(intervals: Intervals, dtype: torch.dtype, head_dim: int) -> Mask:
    """Block lists or document starts; and bool [B, S, 1, 1], False for a fully masked query, or None.

    Raises UserError for rows with images if only flash-attention 2 is installed.
    """
    row_end, not_empty = intervals.row_end, intervals.not_empty[..., None, None]
    try:
        package = flash_package(row_end.device)
        prepared = flash_prepare(row_end, intervals.last_query, intervals.num_keys, package)
    except ValueError as error:
        raise UserError(f"model.attention: flash is not supported ({error})") from error
    return prepared, not_empty if intervals.may_be_empty else None


def attend(q_BSHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, mask: Mask) -> Tensor:
    prepared, not_empty = mask
    o_BSHK = flash_attention(q_BSHK, k_BTGK, v_BTGK, prepared)
    return o_BSHK if not_empty is None else o_BSHK.where(not_empty, 0)
