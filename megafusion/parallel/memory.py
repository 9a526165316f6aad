"""What a rank must hold of weights and optimizer state; docs/parallelism.md derives the formula."""

from typing import NamedTuple

from megafusion.parallel.mesh import Mesh
from megafusion.parallel.pipeline import Stage
from megafusion.train.config import RunConfig


class StateBytes(NamedTuple):
    """Bytes on one rank that a step neither makes nor frees."""

    weights: int
    """What forward and backward read."""
    optimizer: int
    """Float32 masters, where the weights are not those themselves, and the two moments."""
    average: int
    """The averaged weights."""


def state_bytes(stage: Stage, mesh: Mesh, config: RunConfig) -> StateBytes:
    """The formula, padding aside: ZeRO divides by the ranks that share the stage's weights."""
    sizes = [getattr(parameter, "ds_numel", parameter.numel()) for parameter in stage.parameters()]
    whole = sum(sizes)
    word = 4 if config.train.precision == "fp32" else 2
    replicas, zero = mesh.size("data") * mesh.size("ulysses"), config.parallel.zero_stage
    share = whole / (replicas if zero else 1)
    weights = word * whole
    if zero == 3:
        # DeepSpeed keeps the small ones whole on every rank (param_persistence_threshold).
        kept = sum(size for size in sizes if size <= config.model.hidden_size)
        weights = word * ((whole - kept) / replicas + kept)
    return StateBytes(round(weights), round((12 if zero else 8) * share), round(4 * share))
