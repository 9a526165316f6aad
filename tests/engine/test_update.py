"""The update of the weights: against DeepSpeed's own, in one kernel, without reading from the device."""

import traceback
from pathlib import Path
from typing import Any

import megafusion.device  # noqa: F401 - before deepspeed

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megafusion.config import parse_config
from megafusion.engine.fused_update import fused_update, scalars
from megafusion.engine.optimizer_state import Storage
from megafusion.engine.update import Update, update_group
from megafusion.parallel.config import ParallelConfig
from megafusion.parallel.mesh import make_mesh
from megafusion.resilience.config import ResilienceConfig
from megafusion.resilience.consensus import SpikeDetector, StepConsensus
from megafusion.train.build import build_components, build_engine
from megafusion.train.config import RunConfig
from megafusion.train.loop import train_step
from tests.support.engines import BF16, Run, Topology, contents, make_run
from tests.support.marks import full
from tests.support.workers import run_workers

CPU = torch.device("cpu")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OFFLOAD = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}


def ours(topology: Topology) -> Run:
    """A run of `tests.support.engines` whose update is ours, where the others have DeepSpeed's own."""
    run = make_run(topology)
    mesh = make_mesh(ParallelConfig(zero_stage=topology.stage))
    consensus = StepConsensus(mesh, CPU, SpikeDetector(ResilienceConfig()))
    update = Update(run.engine, run.state, consensus, mesh, set(), clip=1.0)
    step = run.engine.step

    def step_and_update() -> None:
        step()
        update.make_or_skip(None)

    run.engine.step = step_and_update
    return run


def differences(topologies: list[Topology]) -> list[float]:
    """Largest difference of weights, moments and averages after some steps."""
    found = []
    for topology in topologies:
        runs = [make_run(topology), ours(topology)]
        for number in range(4):
            for run in runs:
                run.step(number)
        own, other = map(contents, runs)
        found.append(max((own[name] - other[name]).abs().max().item() for name in own))
    return found


def topologies(data: int) -> list[Topology]:
    return [
        *(Topology(data, stage) for stage in range(4)),
        *(Topology(data, stage, BF16) for stage in (1, 2, 3)),
        *(Topology(data, stage, OFFLOAD) for stage in (1, 2, 3)),
    ]


@pytest.mark.parametrize("data", [1, *full(2)])
def test_it_equals_deepspeeds_own(data):
    for found in run_workers(differences, data, topologies(data)):
        assert found == pytest.approx([0.0] * len(found), abs=2e-7)


def storage(size: int, **group: float) -> Storage:
    group = {"lr": 1e-3, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, **group}
    tensors = torch.randn(size), torch.randn(size) / 10, torch.rand(size) / 100, torch.tensor(2.0)
    return Storage(*(tensor.to(DEVICE) for tensor in tensors), group)


def copy_of(found: Storage) -> Storage:
    return Storage(*(tensor.clone() for tensor in found[:4]), found.group)


@pytest.mark.parametrize("moves", [0.01, 0.8])
def test_one_kernel_equals_torchs(moves):
    torch.manual_seed(0)
    size, scale, go = 5003, torch.tensor(0.37, device=DEVICE), torch.tensor(0.0, device=DEVICE)
    own = storage(size)
    other, gradient, average = copy_of(own), torch.randn_like(own.weight), torch.randn_like(own.weight)
    expected_average, model = average.clone(), torch.zeros_like(own.weight).bfloat16()
    fused_update(own, gradient, average, model, scalars(own, scale, go, moves))
    update_group([(other, gradient * scale)], go)
    expected_average.lerp_(other.weight, moves)
    for name in ("weight", "exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(getattr(own, name), getattr(other, name), rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(average, expected_average, rtol=2e-6, atol=1e-7)
    # Triton's interpreter truncates where a GPU rounds.
    expected = own.weight.bfloat16() if DEVICE == "cuda" else _truncated(own.weight)
    assert torch.equal(model, expected)


def _truncated(weight: torch.Tensor) -> torch.Tensor:
    """The upper halves of float32 numbers, as bf16."""
    return weight.view(torch.int32).bitwise_right_shift(16).to(torch.int16).view(torch.bfloat16)


def test_the_kernel_changes_nothing_where_the_update_is_skipped():
    own = storage(3001)
    nan, average, model = (torch.full_like(own.weight, value) for value in (torch.nan, 1.0, 2.0))
    before, kept, skip = copy_of(own), (average.clone(), model.clone()), torch.ones_like(own.step)
    fused_update(own, nan, average, model, scalars(own, skip * torch.nan, skip, 0.5))
    assert all(map(torch.equal, (*own[:4], average, model), (*before[:4], *kept)))


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


def host_reads(runs: list[dict]) -> list[set[str]]:
    found = []
    for values in runs:
        config = parse_config(RunConfig, values, "test")
        mesh = make_mesh(config.parallel)
        engine, loader = build_engine(config, mesh), build_components(config, mesh).loader
        train_step(engine, loader.next(), 1e-3)
        batches = loader.next()
        with HostReads() as reads:
            train_step(engine, batches, 1e-3)
        found.append(reads.lines)
    return found


def laid_out(values: dict, precision: str = "fp32", **parallel: object) -> dict:
    train = {**values["train"], "precision": precision, "micro_batch_size": 1}
    return {**values, "train": train, "parallel": parallel}


ON_THE_HOST = {
    "consensus.py: self.stops = bool(sums[2])",
    "consensus.py: if sums[3]:",
    "mesh.py: return self.device_mesh[axis].size()",
}
"""Counts that gloo has reduced on the host before the step, and torch's table of ranks."""
FORMS = [*(("fp32", stage) for stage in (0, 1, 2, 3)), *(("bf16", stage) for stage in (1, 2, 3))]


@pytest.mark.parametrize("forms", [[("bf16", 1)], *full(FORMS)])
def test_a_step_reads_nothing_from_the_device(run_values, forms):
    runs = [laid_out(run_values, precision, zero_stage=stage) for precision, stage in forms]
    (found,) = run_workers(host_reads, 1, runs)
    assert dict(zip(forms, found, strict=True)) == dict.fromkeys(forms, ON_THE_HOST)
