"""Faults injected into a rank's process before its command runs, where no signal and no disk can reach."""

import os
import time
from pathlib import Path

import torch
import torch.distributed as dist

from megafusion.data.loader import DataLoader
from megafusion.engine.engine import Engine


def nan_gradients(rank: int, victim: int, batches: range) -> None:
    """Make one rank's gradient of a norm's weight NaN for these batches of the run (from 0)."""
    step, number = Engine.forward_backward, [0]

    def bad_step(engine: Engine, *arguments: object) -> object:
        parameter = next(p for name, p in engine.stage.named_parameters() if "norm" in name)
        hook = None
        if dist.get_rank() == victim and number[0] in batches:
            hook = parameter.register_hook(lambda gradient: gradient * float("nan"))
        number[0] += 1
        losses = step(engine, *arguments)
        if hook:
            hook.remove()
        return losses

    Engine.forward_backward = bad_step


def without_batches(rank: int, batches: range) -> None:
    """Remove these batches from the data: the reference of a run that skips them."""
    load, number = DataLoader.next, [0]

    def next_batch(self: DataLoader) -> object:
        while number[0] in batches:
            number[0] += 1
            load(self)
        number[0] += 1
        return load(self)

    DataLoader.next = next_batch


def slow_disk(rank: int, seconds: float) -> None:
    """Delay every fsync."""
    sync = os.fsync

    def slow(descriptor: int) -> None:
        time.sleep(seconds)
        sync(descriptor)

    os.fsync = slow


def with_reference(rank: int, every: int, path: Path) -> None:
    """Time a fixed piece of work, similar to a step, every so many steps, and append its seconds to a file.

    The speed of a shared machine drifts over minutes; the ratio of a step's time to this work's does not.
    """
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(16, 16, generator=generator).requires_grad_() for _ in range(8)]
    step, number = Engine.forward_backward, [0]

    def work() -> None:
        x = weights[0].detach()
        for weight in weights:
            x = torch.nn.functional.rms_norm(x @ weight, (16,))
        for gradient in torch.autograd.grad(x.square().sum(), weights):
            dist.all_reduce(gradient)

    def step_and_work(*arguments: object) -> object:
        losses = step(*arguments)
        number[0] += 1
        if number[0] % every == 0:
            work()
            began = time.perf_counter()
            for _ in range(10):
                work()
            with path.open("a") as file:
                file.write(f"{time.perf_counter() - began}\n")
        return losses

    Engine.forward_backward = step_and_work
