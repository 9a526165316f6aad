"""The fastest measured backend that supports a case."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megafusion.model import attention
from megafusion.sequence.intervals import Intervals

CHOICES = Path(__file__).with_name("choices.json")


def unsupported_reason(device: torch.device, dtype: torch.dtype, head_dim: int, training: bool) -> str:
    return ""


def prepare(intervals: Intervals, dtype: torch.dtype, head_dim: int) -> tuple[Callable, Any]:
    """The `attend` of the chosen backend, and the mask that it prepared."""
    backend = attention.attention_backend(choose(intervals, dtype, head_dim))
    return backend.attend, backend.prepare(intervals, dtype, head_dim)


def attend(q_BSHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, mask: tuple[Callable, Any]) -> Tensor:
    chosen, prepared = mask
    return chosen(q_BSHK, k_BTGK, v_BTGK, prepared)


def choose(intervals: Intervals, dtype: torch.dtype, head_dim: int) -> attention.BackendName:
    """The fastest by `stored_choices`, if measured; else, and for decoding, `interval` in half precision on
    CUDA if supported, or `sdpa`."""
    device, num_rows = intervals.row_end.device, intervals.row_end.shape[1]
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return "sdpa"
    names: list[attention.BackendName] = ["interval", "sdpa"]
    if num_rows == intervals.num_keys:
        major, minor = torch.cuda.get_device_capability(device)
        for choice in sorted(stored_choices(), key=lambda choice: choice["min_rows"]):
            is_same = (choice["architecture"], choice["head_dim"]) == (10 * major + minor, head_dim)
            if is_same and choice["min_rows"] <= num_rows:
                names = choice["backends"] + names
    return next(name for name in names if not _unsupported_reason(name, device, dtype, head_dim, True))


_unsupported_reason = cache(attention.unsupported_reason)


@cache
def stored_choices() -> tuple[dict, ...]:
    """Measurements of `benchmarks/attention.py --write-choices`: `architecture` (90 for sm_90), `head_dim`,
    `min_rows` (the shortest rows they hold for), and `backends`, fastest first."""
    return tuple(json.loads(CHOICES.read_text())["choices"])
