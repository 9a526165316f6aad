"""attention(q, k, v, intervals): one signature for every backend."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from megafusion.errors import UserError
from megafusion.model.config import Backend
from megafusion.sequence.intervals import Intervals

CHOICES = Path(__file__).with_name("attention_choices.json")
Attention = Callable[[Tensor, Tensor, Tensor, Intervals], Tensor]
# What serves when nothing was measured, and the fastest that serves by least number of rows.
Serving = tuple[Backend, tuple[tuple[int, Backend], ...]]


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


def flash(q_BSHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, intervals: Intervals) -> Tensor:
    """flash-attention 4 over block lists, or 2 for rows of text alone; shapes as in `sdpa`."""
    from interval_attention.flash import flash_attention

    o_BSHK = flash_attention(q_BSHK, k_BTGK, v_BTGK, intervals.flash_prepared)
    return o_BSHK.where(intervals.some_visible[..., None, None], 0) if intervals.may_be_empty else o_BSHK


def auto(q_BSHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, intervals: Intervals) -> Tensor:
    """The backend that was measured to be the fastest (see `stored_choices`) of those that serve a case.

    Where nothing was measured: `interval` for half precision on CUDA if it serves the head size; `sdpa` for
    everything else, and for a cache's few queries what serves when nothing was measured.
    """
    name = _chosen(q_BSHK, q_BSHK.shape[-1], q_BSHK.shape[1], intervals)
    return BACKENDS[name](q_BSHK, k_BTGK, v_BTGK, intervals)


def _chosen(x: Tensor, head_dim: int, num_rows: int, intervals: Intervals) -> Backend:
    plain, by_length = _serving(x.device, x.dtype, head_dim)
    if num_rows != intervals.num_keys:
        return plain
    name = plain
    for least_rows, fastest in by_length:
        name = fastest if num_rows >= least_rows else name
    return name


# torch.compile takes the answer for a constant, as it cannot look into packages and files; and it would look
# through a cache.
@torch.compiler.assume_constant_result
def _serving(device: torch.device, dtype: torch.dtype, head_dim: int) -> Serving:
    return _find_serving(device, dtype, head_dim)


@cache
def _find_serving(device: torch.device, dtype: torch.dtype, head_dim: int) -> Serving:
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return "sdpa", ()
    plain = "sdpa" if _refusal("interval", device, dtype, head_dim) else "interval"
    major, minor = torch.cuda.get_device_capability(device)
    by_length = []
    for choice in stored_choices():
        if (choice["architecture"], choice["head_dim"]) == (10 * major + minor, head_dim):
            serving = [b for b in choice["backends"] if not _refusal(b, device, dtype, head_dim)]
            by_length += [(choice["least_rows"], serving[0])] if serving else []
    return plain, tuple(sorted(by_length))


@cache
def stored_choices() -> tuple[dict, ...]:
    """What `benchmarks/attention.py --write-choices` measured: `architecture` (90 for sm_90), `head_dim`,
    `least_rows` from which on it holds, and `backends`, the fastest first."""
    return tuple(json.loads(CHOICES.read_text())["choices"])


def prepare_mask(backend: Backend, intervals: Intervals, x: Tensor, head_dim: int) -> None:
    """Make what a backend reads of the mask before blocks that may be compiled: once made, it is looked up.

    torch.compile gives up where a block makes it. x: of the blocks' device and type.
    """
    name = _chosen(x, head_dim, intervals.row_start.shape[1], intervals) if backend == "auto" else backend
    made = {"sdpa": "additive_mask", "flex": "block_mask", "interval": "prepared", "flash": "flash_prepared"}
    _ = getattr(intervals, made[name])


def check_backend(backend: Backend, head_dim: int) -> None:
    """UserError at start-up where kernels are asked for that cannot serve: there is no silent fall-back."""
    if backend not in ("interval", "flash"):
        return
    reason = "no CUDA device is here"
    if torch.cuda.is_available():
        reason = _refusal(backend, torch.device("cuda"), torch.bfloat16, head_dim)
    if reason:
        raise UserError(f"model.attention: {backend} cannot serve ({reason}); use auto or sdpa")


def _refusal(backend: Backend, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Why kernels do not serve a case; empty where they do, and for what PyTorch itself brings."""
    try:
        if backend == "interval":
            from interval_attention import check_served

            check_served(device, dtype, head_dim)
        elif backend == "flash":
            from interval_attention.flash import check_flash

            check_flash(device, dtype, head_dim)
    except (ImportError, ValueError) as error:
        return str(error)
    return ""


BACKENDS: dict[Backend, Attention] = {
    "auto": auto,
    "sdpa": sdpa,
    "flex": flex,
    "interval": interval,
    "flash": flash,
}
