"""Bytes of weights and optimizer state on a rank; docs/parallelism.md derives the formula."""

from typing import NamedTuple

from megafusion.parallel.mesh import Mesh
from megafusion.parallel.pipeline import Stage


class StateBytes(NamedTuple):
    """Bytes on one rank that a step neither allocates nor frees."""

    weights: int
    """Weights that forward and backward read, frozen ones too."""
    optimizer: int
    """Float32 master weights, unless the weights are their own, and the two moments."""
    average: int
    """Averaged weights (EMA)."""


def state_bytes(stage: Stage, mesh: Mesh, bytes_per_weight: int) -> StateBytes:
    """The formula, without padding. bytes_per_weight: 4 in fp32, 2 in bf16."""
    parameters = list(stage.parameters())
    sizes = [getattr(parameter, "ds_numel", parameter.numel()) for parameter in parameters]
    total = sum(sizes)
    trained = sum(size for size, parameter in zip(sizes, parameters, strict=True) if parameter.requires_grad)
    replicas, zero = mesh.size("data") * mesh.size("ulysses"), mesh.config.zero_stage
    sharded = trained / (replicas if zero else 1)
    weights = bytes_per_weight * total
    if zero == 3:
        # DeepSpeed keeps small parameters whole on every rank (param_persistence_threshold).
        whole = sum(size for size in sizes if size <= stage.config.hidden_size)
        weights = bytes_per_weight * ((total - whole) / replicas + whole)
    return StateBytes(round(weights), round((12 if zero else 8) * sharded), round(4 * sharded))
