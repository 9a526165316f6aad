"""A training step makes the host wait for no device: nothing reads a value or waits for a stream."""

import sys
import traceback
from pathlib import Path
from typing import Any

import megafusion.device  # noqa: F401 - before deepspeed

import pytest
import torch
from deepspeed.accelerator import real_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from torch.utils._python_dispatch import TorchDispatchMode

from megafusion.config import parse_config
from megafusion.parallel.mesh import make_mesh
from megafusion.train.build import build_components, build_engine
from megafusion.train.config import RunConfig
from megafusion.train.loop import train_step
from tests.support.marks import full
from tests.support.workers import run_workers


class HostReads(TorchDispatchMode):
    """Lines of this project that read a tensor's value on the host, which waits for the device."""

    READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "item", "masked_select")

    def __init__(self) -> None:
        super().__init__()
        self.lines: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket._qualified_op_name.rpartition("::")[2] in self.READS:
            frames = [f for f in traceback.extract_stack() if "site-packages/torch/" not in f.filename]
            caller = next(f for f in reversed(frames) if f.filename != __file__)
            self.lines.add(f"{Path(caller.filename).name}: {caller.line}")
        return func(*args, **(kwargs or {}))


def test_a_host_read_is_seen():
    with HostReads() as reads:
        float(torch.ones(2).sum())
        torch.ones(2).nonzero()
    assert reads.lines


class Asynchronous(CPU_Accelerator):
    """A device that the host runs ahead of, to DeepSpeed: it notes each line that waits."""

    def __init__(self, waits: set[str]):
        super().__init__()
        self._stream = Stream(waits)
        self._waits = waits

    def is_synchronized_device(self) -> bool:
        return False

    def handles_memory_backpressure(self) -> bool:
        return False

    def synchronize(self, device_index: int | None = None) -> None:
        note(self._waits)

    def Stream(self) -> "Stream":
        return self._stream

    def current_stream(self, device_index: int | None = None) -> "Stream":
        return self._stream

    default_stream = current_stream

    def Event(self, **_: Any) -> "Stream":
        return self._stream


class Stream:
    """A stream or an event whose work is never done when the host asks."""

    def __init__(self, waits: set[str]):
        self._waits = waits

    def synchronize(self) -> None:
        note(self._waits)

    def query(self) -> bool:
        return False

    def wait_stream(self, *_: object) -> None:
        """Work waits for work, and the host for neither."""

    wait_event = record = wait = wait_stream


def note(waits: set[str]) -> None:
    frame = traceback.extract_stack(sys._getframe(2), limit=1)[0]
    waits.add(f"{Path(frame.filename).name}: {frame.line}")


def host_waits(runs: list[dict]) -> list[tuple[set[str], set[str]]]:
    """Lines of a step that read from the device, and that wait for it, by run."""
    found = []
    torch.Tensor.record_stream = lambda *_: None  # which a tensor on a CPU has no use for
    for values in runs:
        waits: set[str] = set()
        real_accelerator.set_accelerator(Asynchronous(waits))
        config = parse_config(RunConfig, values, "test")
        mesh = make_mesh(config.parallel)
        engine, loader = build_engine(config, mesh), build_components(config, mesh).loader
        train_step(engine, loader.next(), 1e-3)
        batches = loader.next()
        waits.clear()
        with HostReads() as reads:
            train_step(engine, batches, 1e-3)
        found.append((reads.lines, waits))
    return found


def laid_out(values: dict, precision: str, parallel: dict) -> dict:
    train = {**values["train"], "precision": precision, "micro_batch_size": 1}
    model = {**values["model"], "num_layers": 2 * parallel.get("virtual_stages", 1)}
    return {**values, "model": model, "train": train, "parallel": parallel}


ON_THE_HOST = {
    "consensus.py: self.stops = bool(sums[2])",
    "consensus.py: if sums[3]:",
    "mesh.py: return self.device_mesh[axis].size()",
}
"""Counts that gloo has reduced on the host before the step, and torch's table of ranks."""
ZERO_3 = {
    "stage3.py: self.reduce_and_partition_stream.synchronize()",
    "stage3.py: self.param_reduce_events.popleft().synchronize()",
    "partitioned_param_coordinator.py: self.__ongoing_fetch_events.popleft().synchronize()",
}
ONE_RANK = "partition_parameters.py: get_accelerator().current_stream().synchronize()"
SEVERAL_RANKS = "partition_parameters.py: get_accelerator().synchronize()"
"""Lines of DeepSpeed that docs/resilience.md names."""
FORMS = [
    *(("fp32", {"zero_stage": stage}) for stage in (0, 1, 2, 3)),
    *(("bf16", {"zero_stage": stage}) for stage in (1, 2, 3)),
]
SHARDED = [
    *(("fp32", {"pipeline": 2, "zero_stage": stage}) for stage in (0, 1)),
    ("bf16", {"pipeline": 2}),
    ("bf16", {"pipeline": 2, "virtual_stages": 2}),
    ("fp32", {"tensor": 2, "sequence": True}),
    ("fp32", {"ulysses": 2, "zero_stage": 2}),
]


CASES = [(1, [("bf16", {"zero_stage": 1})]), *full((1, FORMS), (2, FORMS + SHARDED))]


@pytest.mark.parametrize(("world", "forms"), CASES)
def test_a_step_makes_the_host_wait_for_nothing(run_values, world, forms):
    runs = [laid_out(run_values, precision, degrees) for precision, degrees in forms]
    for found in run_workers(host_waits, world, runs):
        for (_, degrees), (reads, waits) in zip(forms, found, strict=True):
            assert reads <= ON_THE_HOST
            is_zero_3 = degrees.get("zero_stage") == 3
            known = ZERO_3 | {ONE_RANK if world == 1 else SEVERAL_RANKS} if is_zero_3 else set()
            assert waits == known, degrees


def test_a_wait_is_seen():
    waits: set[str] = set()
    device = Asynchronous(waits)
    device.synchronize()
    device.Event().synchronize()
    assert waits == {
        "test_host_waits.py: device.synchronize()",
        "test_host_waits.py: device.Event().synchronize()",
    }
