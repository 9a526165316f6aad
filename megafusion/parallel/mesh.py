"""Names every rank by its place in (pipeline, data, sequence, tensor), and refuses what cannot be.

Tensor ranks are neighbours, for they talk most; then the Ulysses ranks of a row, data ranks, and stages.
"""

import contextlib
import io
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import megafusion.device  # noqa: F401 - before deepspeed

import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.pipe.topology import PipelineParallelGrid, PipeModelDataParallelTopology
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megafusion.errors import UserError
from megafusion.parallel.config import ParallelConfig

if TYPE_CHECKING:
    from megafusion.train.config import RunConfig

AXES = ("pipeline", "data", "ulysses", "tensor")


@dataclass(frozen=True)
class Mesh:
    """The ranks of a run and this one's place among them. Made by every rank of the world together."""

    device_mesh: DeviceMesh
    """Ranks by the four AXES."""
    tensor_context_group: dist.ProcessGroup
    """The ranks that share this one's rows: along ulysses and tensor together."""
    config: ParallelConfig

    def size(self, axis: str) -> int:
        """Ranks along an axis."""
        return self.device_mesh[axis].size()

    def rank(self, axis: str) -> int:
        """This rank's number along an axis."""
        return self.device_mesh[axis].get_local_rank()

    def group(self, axis: str) -> dist.ProcessGroup:
        """The ranks that differ from this one along an axis alone."""
        return self.device_mesh[axis].get_group()

    @property
    def is_first(self) -> bool:
        """Whether this rank holds the first pipeline stage."""
        return self.rank("pipeline") == 0

    @property
    def is_last(self) -> bool:
        """Whether this rank holds the last pipeline stage."""
        return self.rank("pipeline") == self.size("pipeline") - 1

    @cached_property
    def grid(self) -> PipelineParallelGrid:
        """DeepSpeed's view: to it, the Ulysses ranks of a row are data ranks, for they share all weights."""
        replicas = self.size("data") * self.size("ulysses")
        with contextlib.redirect_stdout(io.StringIO()):
            return PipelineParallelGrid(
                PipeModelDataParallelTopology(self.size("pipeline"), self.size("tensor"), replicas)
            )

    def __str__(self) -> str:
        return ", ".join(f"{axis} {self.rank(axis)} of {self.size(axis)}" for axis in AXES)


def make_mesh(config: ParallelConfig) -> Mesh:
    """Lay the world out; called by every rank. UserError where the degrees do not fill it."""
    data = data_degree(config, dist.get_world_size())
    shape = (config.pipeline, data, config.ulysses, config.tensor)
    device_mesh = init_device_mesh(get_accelerator().device_name(), shape, mesh_dim_names=AXES)
    return Mesh(device_mesh, device_mesh["ulysses", "tensor"]._flatten("rows").get_group(), config)


def data_degree(config: ParallelConfig, world_size: int) -> int:
    """Data-parallel ranks: what is left of the world. UserError, with the arithmetic, if it is not whole."""
    others = config.pipeline * config.ulysses * config.tensor
    if world_size % others:
        raise UserError(
            f"parallel: pipeline {config.pipeline} x ulysses {config.ulysses} x tensor {config.tensor} = "
            f"{others} ranks a copy of the model, but the world has {world_size} ranks, which is not a "
            f"multiple of {others}"
        )
    return world_size // others


def check_degrees(config: "RunConfig", world_size: int) -> None:
    """UserError at start for degrees that do not divide what they share, with the arithmetic."""
    model, parallel, train = config.model, config.parallel, config.train
    data = data_degree(parallel, world_size)
    heads = parallel.tensor * parallel.ulysses
    slices = parallel.ulysses * (parallel.tensor if parallel.sequence else 1)
    named_heads = f"parallel.tensor {parallel.tensor} x parallel.ulysses {parallel.ulysses} = {heads}"
    rules = [
        (
            model.num_heads % heads == 0,
            f"model.num_heads {model.num_heads} is not a multiple of {named_heads}",
        ),
        (
            model.kv_heads % heads == 0,
            f"model.num_kv_heads {model.kv_heads} is not a multiple of {named_heads}; key and value heads "
            "are divided, not copied",
        ),
        (
            model.ffn_size % parallel.tensor == 0,
            f"model.ffn_hidden_size {model.ffn_size} is not a multiple of parallel.tensor {parallel.tensor}",
        ),
        (
            model.vocab_size
            >= vocab_shard_size(model.vocab_size, parallel.tensor) * (parallel.tensor - 1) + 1,
            f"model.vocab_size {model.vocab_size} is too small for parallel.tensor {parallel.tensor}",
        ),
        (
            config.data.sequence_length % slices == 0,
            f"data.sequence_length {config.data.sequence_length} is not a multiple of the {slices} slices of "
            "positions (parallel.ulysses, times parallel.tensor with parallel.sequence)",
        ),
        (
            model.num_layers >= parallel.pipeline,
            f"model.num_layers {model.num_layers} is less than the stages of parallel.pipeline "
            f"{parallel.pipeline}",
        ),
        (
            train.global_batch_size % (train.micro_batch_size * data) == 0,
            f"train.global_batch_size {train.global_batch_size} is not a multiple of train.micro_batch_size "
            f"{train.micro_batch_size} x {data} data-parallel ranks (a world of {world_size} / "
            f"{world_size // data})",
        ),
    ]
    if broken := [message for holds, message in rules if not holds]:
        raise UserError("\n".join(broken))


def vocab_shard_size(vocab_size: int, tensor: int) -> int:
    """Rows of the vocabulary on each tensor rank but the last: a multiple of 64, which matrix units like."""
    share = -(-vocab_size // tensor)
    return -(-share // 64) * 64 if tensor > 1 else share
