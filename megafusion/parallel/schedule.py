"""Order of the passes of pipeline ranks, and a simulated clock that counts idle time. Imports no torch.

Interleaved 1F1B (Narayanan et al., arXiv 2104.04473): the blocks are in virtual stages, `num_virtual` on each
of `num_ranks` pipeline ranks; virtual stage `v` of rank `r` is the `v * num_ranks + r`-th of the model.
Micro-batches pass in groups of `num_ranks`: a group passes through one virtual stage of a rank, then through
the next. With one virtual stage a rank it is 1F1B.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Literal, NamedTuple

Direction = Literal["forward", "backward"]

COSTS: dict[Direction, float] = {"forward": 1.0, "backward": 2.0}
"""Time of a pass, relative to a forward pass."""

MAX_SENDS = 4
"""Sends in flight at most. Two ranks list their transfers in one order (`simulate`), so that waiting for the
oldest cannot deadlock."""


class Pass(NamedTuple):
    """A pass of a micro-batch through a virtual stage of a rank."""

    direction: Direction
    virtual_stage: int
    micro_batch: int


class Instruction(NamedTuple):
    """A rank's next act: it runs a pass, or sends its result, or begins to receive its input."""

    action: Literal["run", "send", "receive"]
    work: Pass


class InFlight(NamedTuple):
    """Passes and transfers that a rank holds at a moment of a training step."""

    passes: tuple[int, ...]
    """Micro-batches whose activations it holds, by virtual stage."""
    transfers: int
    """Tensors beside them: inputs and gradients that wait for their passes, and gradients that are sent."""


class Timeline(NamedTuple):
    """Figures of the simulated clock."""

    instructions: list[list[Instruction]]
    """By rank, in the order of the clock."""
    idle: list[float]
    """Time by rank in which it runs no pass, from the first pass of any rank to the last."""


def num_warmup(rank: int, num_ranks: int, num_virtual: int) -> int:
    """Forward passes of a rank before it runs one forward, one backward."""
    if num_virtual == 1:
        return num_ranks - 1 - rank
    return (num_virtual - 1) * num_ranks + 2 * (num_ranks - 1 - rank)


def training_passes(rank: int, num_ranks: int, num_virtual: int, num_micro_batches: int) -> list[Pass]:
    """The passes of a training step on a rank, in order.

    With several virtual stages, `num_micro_batches` must be a multiple of `num_ranks`.
    """
    forward = forward_passes(num_ranks, num_virtual, num_micro_batches)
    backward = [
        Pass("backward", num_virtual - 1 - virtual_stage, micro_batch)
        for _, virtual_stage, micro_batch in forward
    ]
    warmup = min(num_warmup(rank, num_ranks, num_virtual), len(forward))
    both = [each for pair in zip(forward[warmup:], backward, strict=False) for each in pair]
    return [*forward[:warmup], *both, *backward[len(forward) - warmup :]]


def forward_passes(num_ranks: int, num_virtual: int, num_micro_batches: int) -> list[Pass]:
    """The passes of an evaluation on every rank, in order; any number of micro-batches."""
    return [
        Pass("forward", virtual_stage, micro_batch)
        for first in range(0, num_micro_batches, num_ranks)
        for virtual_stage in range(num_virtual)
        for micro_batch in range(first, min(first + num_ranks, num_micro_batches))
    ]


def simulate(passes: list[list[Pass]], seconds: Sequence[float]) -> Timeline:
    """Run the passes of all ranks by a simulated clock.

    seconds: of a forward pass through each virtual stage of the model. A backward pass takes twice as long,
    and a transfer nothing. A rank sends a result when it has it, and the next rank begins to receive it at
    that time, so that the transfers of any two ranks are in one order on both. AssertionError if the ranks
    wait for each other.
    """
    num_ranks, last = len(passes), len(seconds) - 1
    instructions: list[list[Instruction]] = [[] for _ in passes]
    clocks, positions = [0.0] * num_ranks, [0] * num_ranks
    # By direction, virtual stage of the model and micro-batch.
    ends: dict[tuple[Direction, int, int], float] = {}

    def finishes(rank: int) -> float | None:
        """When a rank's next pass ends; None without one, or before its input is there."""
        if positions[rank] == len(passes[rank]):
            return None
        direction, virtual_stage, micro_batch = passes[rank][positions[rank]]
        stage, begin = virtual_stage * num_ranks + rank, clocks[rank]
        took = seconds[stage] * COSTS[direction]
        source: tuple[Direction, int]
        if direction == "backward":
            source = ("backward", stage + 1) if stage < last else ("forward", stage)
        elif stage == 0:
            return begin + took
        else:
            source = "forward", stage - 1
        found = ends.get((*source, micro_batch))
        return None if found is None else max(begin, found) + took

    for _ in range(sum(map(len, passes))):
        ready = [(end, rank) for rank in range(num_ranks) if (end := finishes(rank)) is not None]
        assert ready, f"the ranks wait for each other at passes {positions}"
        end, rank = min(ready)
        work = passes[rank][positions[rank]]
        stage = work.virtual_stage * num_ranks + rank
        clocks[rank], positions[rank] = end, positions[rank] + 1
        ends[work.direction, stage, work.micro_batch] = end
        instructions[rank].append(Instruction("run", work))
        target = stage + (1 if work.direction == "forward" else -1)
        if 0 <= target <= last:
            virtual_stage, receiver = divmod(target, num_ranks)
            instructions[rank].append(Instruction("send", work))
            received = work._replace(virtual_stage=virtual_stage)
            instructions[receiver].append(Instruction("receive", received))
    busy = [
        sum(seconds[work.virtual_stage * num_ranks + rank] * COSTS[work.direction] for work in own)
        for rank, own in enumerate(passes)
    ]
    return Timeline(instructions, [max(clocks) - own for own in busy])


def training_timeline(
    num_ranks: int, num_virtual: int, num_micro_batches: int, seconds: Sequence[float] | None = None
) -> Timeline:
    """The timeline of a training step; without `seconds`, a rank's forward pass of a micro-batch takes 1."""
    sizes = num_ranks, num_virtual, num_micro_batches
    passes = [training_passes(rank, *sizes) for rank in range(num_ranks)]
    return simulate(passes, seconds or [1 / num_virtual] * (num_ranks * num_virtual))


def evaluation_timeline(num_ranks: int, num_virtual: int, num_micro_batches: int) -> Timeline:
    """The timeline of an evaluation."""
    passes = forward_passes(num_ranks, num_virtual, num_micro_batches)
    return simulate([passes] * num_ranks, [1 / num_virtual] * (num_ranks * num_virtual))


def bubble(num_ranks: int, num_virtual: int) -> float:
    """Idle time of a rank in a training step, in times of a micro-batch: its forward and backward passes.

    `simulate` shows the same.
    """
    return (num_ranks - 1) / num_virtual


@cache
def in_flight(rank: int, num_ranks: int, num_virtual: int, num_micro_batches: int) -> frozenset[InFlight]:
    """Passes and transfers that a rank holds at every moment of a training step."""
    # It repeats after two groups.
    few = min(num_micro_batches, 3 * num_ranks)
    if num_virtual > 1:
        return frozenset(_held(_timeline(num_ranks, num_virtual, few).instructions[rank], rank, num_ranks))
    runs = [Instruction("run", work) for work in training_passes(rank, num_ranks, 1, few)]
    # DeepSpeed's engine has a buffer for inputs and one for gradients. The last stage keeps its outputs,
    # whose graphs hold the input of the micro-batch before and its gradient.
    num_buffers = (rank > 0) + (rank < num_ranks - 1) + 2 * (0 < rank == num_ranks - 1)
    return frozenset(held._replace(transfers=num_buffers) for held in _held(runs, rank, num_ranks))


_timeline = cache(training_timeline)


def _held(instructions: list[Instruction], rank: int, num_ranks: int) -> Iterator[InFlight]:
    """Passes and transfers that a rank holds after each instruction, as interleaved.py follows them."""
    num_virtual = 1 + max(work.virtual_stage for _, work in instructions)
    counts, received, last = [0] * num_virtual, 0, num_ranks * num_virtual - 1
    sends: deque[bool] = deque()
    for action, (direction, virtual_stage, _) in instructions:
        if action == "receive":
            received += 1
        elif action == "send":
            sends.append(direction == "backward")  # the others are kept with their passes
        else:
            stage = virtual_stage * num_ranks + rank
            received -= stage > 0 if direction == "forward" else stage < last
            counts[virtual_stage] += 1 if direction == "forward" else -1
        if len(sends) > MAX_SENDS:
            sends.popleft()
        yield InFlight(tuple(counts), received + sum(sends))
