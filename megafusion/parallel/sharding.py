"""Where a rank's part of a parameter lies in the whole parameter.

A checkpoint knows names and whole shapes only; what a rank holds is described by its layout, so that any
topology can write and any other can read.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class ShardSpan:
    """`length` consecutive indices along the cut dimension: where they stand here, and in the whole."""

    local_start: int
    whole_start: int
    length: int


@dataclass(frozen=True)
class ShardSpec:
    """A parameter cut along one dimension; a fused one (queries, keys and values) has several runs."""

    shape: torch.Size
    """Shape of the whole parameter."""
    dim: int
    """Dimension that is cut."""
    runs: tuple[ShardSpan, ...]
    """What of it is here, in the order in which it lies here."""

    def take(self, whole: Tensor) -> Tensor:
        """This rank's part of a whole tensor."""
        parts = [whole.narrow(self.dim, run.whole_start, run.length) for run in self.runs]
        return torch.cat(parts, self.dim)


def set_shard_spec(parameter: nn.Parameter, layout: ShardSpec) -> None:
    """Remember with a parameter that it is a part."""
    parameter.part = layout


def shard_spec_of(parameter: nn.Parameter) -> ShardSpec:
    """A parameter's layout; one that was never cut is whole."""
    if (layout := getattr(parameter, "part", None)) is not None:
        return layout
    # A ZeRO-3 parameter is empty between uses, and remembers its shape.
    shape = getattr(parameter, "ds_shape", parameter.shape)
    rows = shape[0] if shape else 1
    return ShardSpec(torch.Size(shape), 0, (ShardSpan(0, 0, rows),))
