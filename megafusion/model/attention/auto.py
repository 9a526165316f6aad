"""The fastest measured backend that serves a case."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megafusion.model import attention
from megafusion.sequence.intervals import Intervals

CHOICES = Path(__file__).with_name("choices.json")


class ChosenMask(NamedTuple):
    """The mask of a batch as the chosen backend prepared it, and that backend's attention."""

    attend: Callable[[Tensor, Tensor, Tensor, Any], Tensor]
    mask: Any


def refusal(device: torch.device, dtype: torch.dtype, head_dim: int, training: bool) -> str:
    return ""


def prepare(intervals: Intervals, dtype: torch.dtype, head_dim: int) -> ChosenMask:
    backend = attention.attention_backend(choose(intervals, dtype, head_dim))
    return ChosenMask(backend.attend, backend.prepare(intervals, dtype, head_dim))


def attend(q_BSHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, mask: ChosenMask) -> Tensor:
    return mask.attend(q_BSHK, k_BTGK, v_BTGK, mask.mask)


def choose(intervals: Intervals, dtype: torch.dtype, head_dim: int) -> attention.BackendName:
    """The fastest by `stored_choices`; without a measurement, and for decoding, `interval`, else `sdpa`.

    Always `sdpa` on CPUs and in float32.
    """
    device, num_rows = intervals.row_start.device, intervals.row_start.shape[1]
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return "sdpa"
    names: list[attention.BackendName] = ["interval", "sdpa"]
    if num_rows == intervals.num_keys:
        major, minor = torch.cuda.get_device_capability(device)
        for choice in sorted(stored_choices(), key=lambda choice: choice["min_rows"]):
            is_same = (choice["architecture"], choice["head_dim"]) == (10 * major + minor, head_dim)
            if is_same and choice["min_rows"] <= num_rows:
                names = choice["backends"] + names
    return next(name for name in names if not _refusal(name, device, dtype, head_dim, True))


_refusal = cache(attention.refusal)


@cache
def stored_choices() -> tuple[dict, ...]:
    """Measurements of `benchmarks/attention.py --write-choices`: `architecture` (90 for sm_90), `head_dim`,
    `min_rows` (the shortest rows they hold for), and `backends`, fastest first."""
    return tuple(json.loads(CHOICES.read_text())["choices"])
