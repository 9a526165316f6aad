"""attention(q, k, v, intervals): one signature for every backend."""

from collections.abc import Callable
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from megafusion.errors import UserError
from megafusion.sequence.intervals import Intervals

Backend = Literal["auto", "sdpa", "flex", "interval"]
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


def flex(q_BSHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, intervals: Intervals) -> Tensor:
    """PyTorch's FlexAttention with the intervals as a BlockMask, shapes as in `sdpa`; compiled on CUDA.

    UserError for gradients on a CPU, for which PyTorch has no such backward pass.
    """
    if not q_BSHK.is_cuda and (q_BSHK.requires_grad or k_BTGK.requires_grad or v_BTGK.requires_grad):
        raise UserError(
            "model.attention: flex cannot train on a CPU (PyTorch has no backward there); use sdpa"
        )
    attend = _compiled_flex() if q_BSHK.is_cuda else flex_attention
    q, k, v = (x.transpose(1, 2) for x in (q_BSHK, k_BTGK, v_BTGK))
    grouped = q.shape[1] != k.shape[1]
    return attend(q, k, v, block_mask=intervals.block_mask, enable_gqa=grouped).transpose(1, 2)


@cache
def _compiled_flex() -> Callable:
    return torch.compile(flex_attention)


def interval(q_BSHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, intervals: Intervals) -> Tensor:
    """The Triton kernels of `kernels/interval_attention`, shapes as in `sdpa`: CUDA only."""
    # Not at the top: Triton exists for Linux alone, and the other backends need none.
    from interval_attention import prepared_attention

    return prepared_attention(q_BSHK, k_BTGK, v_BTGK, intervals.prepared)


def auto(q_BSHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, intervals: Intervals) -> Tensor:
    """`interval` for half precision on CUDA where it serves the head size; `sdpa` for everything else."""
    return BACKENDS[_chosen(q_BSHK, q_BSHK.shape[-1])](q_BSHK, k_BTGK, v_BTGK, intervals)


def _chosen(x: Tensor, head_size: int) -> Backend:
    half = x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)
    return "interval" if half and not _refusal(x.device, x.dtype, head_size) else "sdpa"


def prepare_mask(backend: Backend, intervals: Intervals, x: Tensor, head_size: int) -> None:
    """Make what a backend reads of the mask before blocks that may be compiled: once made, it is looked up.

    torch.compile gives up where a block makes it. x: of the blocks' device and type.
    """
    name = _chosen(x, head_size) if backend == "auto" else backend
    _ = getattr(intervals, {"sdpa": "additive_mask", "flex": "block_mask", "interval": "prepared"}[name])


def check_backend(backend: Backend, head_size: int) -> None:
    """UserError at start-up where `interval` is asked for and cannot serve: there is no silent fall-back."""
    if backend != "interval":
        return
    reason = "no CUDA device is here"
    if torch.cuda.is_available():
        reason = _refusal(torch.device("cuda"), torch.bfloat16, head_size)
    if reason:
        raise UserError(f"model.attention: interval cannot serve ({reason}); use auto or sdpa")


def _refusal(device: torch.device, dtype: torch.dtype, head_size: int) -> str:
    """Why the kernels do not serve a case; empty where they do."""
    try:
        from interval_attention import check_served

        check_served(device, dtype, head_size)
    except (ImportError, ValueError) as error:
        return str(error)
    return ""


BACKENDS: dict[str, Attention] = {"auto": auto, "sdpa": sdpa, "flex": flex, "interval": interval}
