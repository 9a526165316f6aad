"""The shard of a parameter that a rank holds.

A checkpoint knows names and whole shapes only. A `ShardSpec` says which indices of the whole a rank holds, so
that any topology can write and any other can read.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ShardSpan:
    """`length` consecutive indices of the sharded dimension: their start in the shard and in the whole."""

    local_start: int
    whole_start: int
    length: int


@dataclass(frozen=True)
class ShardSpec:
    """A parameter sharded along one dimension; a fused one (queries, keys and values) has several spans."""

    shape: torch.Size
    """Shape of the whole parameter."""
    dim: int
    """Dimension that is sharded."""
    spans: tuple[ShardSpan, ...]
    """Indices of this shard, in its order."""

    def shard(self, whole: Tensor) -> Tensor:
        """This rank's shard of a whole tensor."""
        parts = [whole.narrow(self.dim, span.whole_start, span.length) for span in self.spans]
        return torch.cat(parts, self.dim)


def set_shard_spec(parameter: Tensor, spec: ShardSpec) -> None:
    """Attach to a parameter the shard that it is."""
    parameter.shard_spec = spec  # type: ignore[attr-defined]


def shard_spec_of(parameter: Tensor) -> ShardSpec:
    """The shard that a parameter is; of a parameter that is not sharded, one span of everything."""
    if (spec := getattr(parameter, "shard_spec", None)) is not None:
        return spec
    # A ZeRO-3 parameter is empty between uses; DeepSpeed keeps its shape.
    shape = getattr(parameter, "ds_shape", parameter.shape)
    rows = shape[0] if shape else 1
    return ShardSpec(torch.Size(shape), 0, (ShardSpan(0, 0, rows),))
