"""Attention under interval masks, by one of several backends.

To add a backend, write a module here with the functions of `AttentionBackend`, and add its name to
`BackendName` in model/config.py.
"""

from importlib import import_module
from typing import Any, Protocol

from megafusion.device import default_device

import torch
from torch import Tensor

from megafusion.errors import UserError
from megafusion.model.config import BackendName
from megafusion.sequence.intervals import Intervals


class AttentionBackend(Protocol):
    """The functions of a backend's module. All backends agree within rounding."""

    def unsupported_reason(
        self, device: torch.device, dtype: torch.dtype, head_dim: int, training: bool
    ) -> str:
        """Reason the backend is unsupported; empty if supported. May raise ImportError or ValueError."""

    def prepare(self, intervals: Intervals, dtype: torch.dtype, head_dim: int) -> Any:
        """The mask in the backend's own form: made once a batch, outside of compiled blocks."""

    def attend(self, q_BSHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, mask: Any) -> Tensor:
        """Attention output [B, S, H, K] under a mask from `prepare`; zeros for a fully masked query.

        G divides H (grouped-query attention); T = num_keys of the intervals.
        """


def attention_backend(name: BackendName) -> AttentionBackend:
    """The backend of a name, imported on first use: Triton exists on Linux only, dynamo imports slowly."""
    return import_module(f"{__name__}.{name}")


def unsupported_reason(
    name: BackendName, device: torch.device, dtype: torch.dtype, head_dim: int, training: bool
) -> str:
    """Reason a backend is unsupported, for example a missing package; empty if supported."""
    try:
        return attention_backend(name).unsupported_reason(device, dtype, head_dim, training)
    except (ImportError, ValueError) as error:
        return str(error)


def check_backend(
    name: BackendName, head_dim: int, dtype: torch.dtype = torch.bfloat16, training: bool = False
) -> None:
    """Raise UserError if this machine's device does not support a backend: there is no silent fallback.

    dtype: of queries, keys and values; the default is supported by every backend.
    """
    if reason := unsupported_reason(name, default_device(), dtype, head_dim, training):
        raise UserError(f"model.attention: {name} is not supported here ({reason}); use auto or sdpa")
