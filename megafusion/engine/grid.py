"""The mesh as DeepSpeed sees it."""

import contextlib
import io

import megafusion.device  # noqa: F401 - before deepspeed

from deepspeed.runtime.pipe.topology import PipelineParallelGrid, PipeModelDataParallelTopology

from megafusion.parallel.mesh import Mesh


def make_topology(mesh: Mesh) -> PipeModelDataParallelTopology:
    """Pipeline, data and tensor ranks. Ulysses ranks hold the same weights, so they count as data ranks."""
    num_replicas = mesh.size("data") * mesh.size("ulysses")
    return PipeModelDataParallelTopology(mesh.size("pipeline"), mesh.size("tensor"), num_replicas)


def make_grid(mesh: Mesh) -> PipelineParallelGrid:
    """The process groups of that topology, for the engine without a pipeline. Called by every rank."""
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its ranks
        return PipelineParallelGrid(make_topology(mesh))
