"""The device mesh: a rank's coordinates are (pipeline, data, ulysses, tensor), the last changing fastest.

Tensor ranks are neighbours because they communicate most; then Ulysses ranks, data ranks, and stages.
"""

from dataclasses import dataclass

from megafusion.device import default_device

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megafusion.parallel.config import ParallelConfig
from megafusion.parallel.degrees import data_degree

AXES = ("pipeline", "data", "ulysses", "tensor")


@dataclass(frozen=True)
class Mesh:
    """The ranks of a run and this one's coordinates."""

    device_mesh: DeviceMesh
    """Ranks by coordinates along the four AXES."""
    tensor_context_group: dist.ProcessGroup
    """The ranks with this one's rows: along ulysses and tensor together."""
    config: ParallelConfig

    def size(self, axis: str) -> int:
        """Number of ranks along an axis."""
        return self.device_mesh[axis].size()

    def rank(self, axis: str) -> int:
        """This rank's coordinate along an axis, its rank in `group(axis)`."""
        return self.device_mesh[axis].get_local_rank()

    def group(self, axis: str) -> dist.ProcessGroup:
        """The ranks whose coordinates differ from this one's along an axis alone."""
        return self.device_mesh[axis].get_group()


def make_mesh(config: ParallelConfig) -> Mesh:
    """Make the mesh of the world; called by every rank. UserError unless the degrees fill it."""
    data = data_degree(config, dist.get_world_size())
    shape = (config.pipeline, data, config.ulysses, config.tensor)
    device_mesh = init_device_mesh(default_device().type, shape, mesh_dim_names=AXES)
    return Mesh(device_mesh, device_mesh["ulysses", "tensor"]._flatten("tensor_context").get_group(), config)
