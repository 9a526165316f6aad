"""Interleaved 1F1B: the passes of a pipeline rank with several virtual stages, and its transfers.

DeepSpeed's pipeline engine knows one stage a rank. It keeps the optimizer and the reduction of gradients;
this makes the passes in place of its schedules (engine/engine.py).
"""

from collections import deque
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megafusion.parallel.mesh import Mesh
from megafusion.parallel.pipeline import PipelineLosses, Stage
from megafusion.parallel.schedule import (
    MAX_SENDS,
    Instruction,
    Pass,
    evaluation_timeline,
    training_timeline,
)
from megafusion.sequence.packing import PackedBatch


class Transfer(NamedTuple):
    """Tensors in flight between two ranks, which stay in memory until they have arrived."""

    tensors: list[Tensor]
    works: list[dist.Work | None]

    def wait(self) -> list[Tensor]:
        for work in self.works:
            assert work is not None  # of a rank outside the group
            work.wait()
        return self.tensors


class InterleavedPipeline:
    """Runs this rank's virtual stages over micro-batches, in the order of `schedule.py`.

    Micro-batches are read by the first and the last virtual stage of the model alone, one at a time.
    """

    def __init__(self, stage: Stage, losses: PipelineLosses, mesh: Mesh, device: torch.device):
        self._stage, self._losses, self._device = stage, losses, device
        self._group, self._rank = mesh.group("pipeline"), mesh.rank("pipeline")
        self._sizes = mesh.size("pipeline"), len(stage.virtual_stages)
        self._batches: Iterator[PackedBatch] = iter(())
        self._received: dict[Pass, Transfer] = {}
        self._kept: dict[tuple[int, int], tuple[Tensor | None, Tensor]] = {}
        """By virtual stage and micro-batch: the floats that came in, and what backward begins with."""

    def train(self, batches: Iterator[PackedBatch], num_micro_batches: int) -> None:
        """Accumulate the gradients of micro-batches."""
        self._run(_training(self._rank, *self._sizes, num_micro_batches), batches)

    @torch.no_grad()
    def evaluate(self, batches: Iterator[PackedBatch], num_micro_batches: int) -> None:
        """Report the sums of micro-batches, without gradients."""
        self._run(_evaluation(self._rank, *self._sizes, num_micro_batches), batches)

    def _run(self, instructions: list[Instruction], batches: Iterator[PackedBatch]) -> None:
        self._batches = batches
        self._received, self._kept = {}, {}
        sends: deque[Transfer] = deque()
        result: list[Tensor] = []
        for action, work in instructions:
            if action == "receive":
                self._received[work] = self._receive(work)
            elif action == "send":
                sends.append(self._send(work, result))
            elif work.direction == "forward":
                result = self._forward(work)
            else:
                result = self._backward(work)
            if len(sends) > MAX_SENDS:
                sends.popleft().wait()
        for transfer in sends:
            transfer.wait()

    def _forward(self, work: Pass) -> list[Tensor]:
        """Floats and integers for the next virtual stage; nothing after the model's last."""
        stage, number = self._stage, work.virtual_stage
        floats = None
        if stage.is_first(number):
            outputs = stage(next(self._batches).inputs(), number)
        else:
            floats, integers = self._received.pop(work).wait()
            floats.requires_grad_(torch.is_grad_enabled())
            outputs = stage((floats, integers), number)
        is_last = stage.is_last(number)
        root = self._losses(outputs, next(self._batches).targets()) if is_last else outputs[0]
        if torch.is_grad_enabled():
            self._kept[number, work.micro_batch] = floats, root
        return [] if is_last else [root.detach(), outputs[1]]

    def _backward(self, work: Pass) -> list[Tensor]:
        """The gradient for the virtual stage before; nothing before the model's first."""
        floats, root = self._kept.pop((work.virtual_stage, work.micro_batch))
        is_last = self._stage.is_last(work.virtual_stage)
        gradient = None if is_last else self._received.pop(work).wait()[0]
        if root.requires_grad:  # all but the model's first virtual stage, if it is frozen
            root.backward(gradient)
        if floats is None:
            return []
        assert floats.grad is not None
        return [floats.grad]

    def _receive(self, work: Pass) -> Transfer:
        tensors = [torch.empty(self._stage.num_floats, dtype=self._dtype, device=self._device)]
        if work.direction == "forward":
            tensors.append(torch.empty(self._stage.num_integers, dtype=torch.int32, device=self._device))
        source = self._neighbour(-1 if work.direction == "forward" else 1)
        works = [dist.irecv(tensor, group=self._group, group_src=source) for tensor in tensors]
        return Transfer(tensors, works)

    def _send(self, work: Pass, tensors: list[Tensor]) -> Transfer:
        assert tensors[0].dtype == self._dtype, f"{tensors[0].dtype} is sent as {self._dtype}"
        target = self._neighbour(1 if work.direction == "forward" else -1)
        works = [dist.isend(tensor, group=self._group, group_dst=target) for tensor in tensors]
        return Transfer(tensors, works)

    def _neighbour(self, distance: int) -> int:
        return (self._rank + distance) % self._sizes[0]

    @property
    def _dtype(self) -> torch.dtype:
        """Of the residual stream: that of the blocks' weights."""
        return next(self._stage.blocks.parameters()).dtype


@cache
def _training(rank: int, num_ranks: int, num_virtual: int, num_micro_batches: int) -> list[Instruction]:
    return training_timeline(num_ranks, num_virtual, num_micro_batches).instructions[rank]


@cache
def _evaluation(rank: int, num_ranks: int, num_virtual: int, num_micro_batches: int) -> list[Instruction]:
    return evaluation_timeline(num_ranks, num_virtual, num_micro_batches).instructions[rank]
