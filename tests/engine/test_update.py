"""The update of the weights: against DeepSpeed's own, in one kernel, without reading from the device."""

from typing import Any

import megafusion.device  # noqa: F401 - before deepspeed

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import megafusion.engine.fused_update as fused_module
from megafusion.config import parse_config
from megafusion.engine.ema import Ema
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
        update.end_micro_batch()
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


@pytest.mark.parametrize(
    ("data", "cases"), [(1, [Topology(1, 1, BF16)]), *full((1, topologies(1)), (2, topologies(2)))]
)
def test_it_equals_deepspeeds_own(data, cases):
    for found in run_workers(differences, data, cases):
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


def laid_out(values: dict, precision: str = "fp32", **parallel: object) -> dict:
    train = {**values["train"], "precision": precision, "micro_batch_size": 1}
    return {**values, "train": train, "parallel": parallel}


class Moved(TorchDispatchMode):
    """Bytes that torch's operators read and write, without views."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.is_view or func.overloadpacket._qualified_op_name.startswith("c10d::"):
            return result
        overwrites = func.overloadpacket._qualified_op_name in ("aten::copy_", "aten::zero_", "aten::fill_")
        for argument, value in zip(func._schema.arguments, args, strict=False):
            writes = bool(argument.alias_info and argument.alias_info.is_write)
            self._add(value, writes + (not (writes and overwrites)))
        if not any(a.alias_info for a in func._schema.arguments):
            self._add(result, 1)
        return result

    def _add(self, value: Any, times: int) -> None:
        for tensor in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(tensor, torch.Tensor):
                self.bytes += times * tensor.nbytes


def fused_steps(values: dict) -> tuple[float, bool]:
    """Largest relative difference of one kernel's update from torch's; whether it skips NaN."""
    config = parse_config(RunConfig, values, "test")
    mesh = make_mesh(config.parallel)
    batches = build_components(config, mesh).loader.next()
    states = []
    for is_fused in (False, True):
        engine = build_engine(config, mesh)
        ema, update = Ema(engine.optimizer_state.shards, 0.9), engine._update
        update.is_fused = is_fused  # under Triton's interpreter
        train_step(engine, batches, 1e-3, ema.after(1))
        tensors = [t for s in engine.optimizer_state.shards for t in (s.weight, s.exp_avg, s.exp_avg_sq)]
        states.append([t.clone() for t in (*tensors, *ema.fragments)])
    worst = max(
        ((a - b).abs().max() / a.abs().max().clamp(min=1e-6)).item() for a, b in zip(*states, strict=True)
    )
    parameter = next(p for p in engine.stage.parameters() if p.requires_grad)
    hook = parameter.register_hook(lambda gradient: gradient * float("nan"))
    weights = [p.detach().clone() for p in engine.stage.parameters()]
    train_step(engine, batches, 1e-3, ema.after(2))
    hook.remove()
    kept = all(map(torch.equal, (*tensors, *ema.fragments), states[1]))
    kept &= all(map(torch.equal, weights, engine.stage.parameters())) and engine.consensus.is_skipped
    train_step(engine, batches, 1e-3, ema.after(2))
    kept &= not engine.consensus.is_skipped
    return worst, kept


def moved_bytes(values: dict) -> list[float]:
    """Bytes a parameter that a step's first and second micro-batch move beside autograd, and the update."""
    config = parse_config(RunConfig, values, "test")
    mesh = make_mesh(config.parallel)
    engine = build_engine(config, mesh)
    ema = Ema(engine.optimizer_state.shards, 0.9)
    train_step(engine, build_components(config, mesh).loader.next(), 1e-3)
    engine._update.is_fused = True
    optimizer, update = engine._deepspeed.optimizer, engine._update
    parameters = [p for group in optimizer.bf16_groups for p in group]
    total, found = sum(p.numel() for p in parameters), []
    for _ in range(2):
        added = 0
        for index, parameter in enumerate(parameters):
            parameter.grad = torch.ones_like(parameter)
            with Moved() as moved:
                update._gradients.buckets.add(index, parameter)
            added += moved.bytes
        found.append(added / total)
    launched = []
    launch, fused_module._update = fused_module._update, _Launches(launched)
    with Moved() as moved:
        update.make_or_skip(ema.after(2))
    fused_module._update = launch
    return [*found, (moved.bytes + sum(launched)) / total]


class _Launches:
    """In place of the kernel: bytes that it would read and write."""

    def __init__(self, found: list[int]):
        self._found = found

    def __getitem__(self, grid: tuple[int]) -> Any:
        def launch(weight: Any, gradient: Any, exp_avg: Any, exp_avg_sq: Any, *others: Any, **_: Any) -> None:
            average, model = others[:2]
            both = (weight, exp_avg, exp_avg_sq, average)
            self._found.append(2 * sum(t.nbytes for t in both) + gradient.nbytes + model.nbytes)

        return launch


def test_bytes_a_parameter(run_values):
    ((first, further, update),) = run_workers(moved_bytes, 1, laid_out(run_values, "bf16"))
    assert (first, further) == (6, 10)
    assert 42 <= update < 46


@pytest.mark.full
@pytest.mark.parametrize(
    "layout",
    [
        ("bf16", {}),
        ("bf16", {"pipeline": 2}),
        ("bf16", {"tensor": 2}),
        ("bf16", {"zero_stage": 2}),
        ("fp32", {"zero_stage": 1}),
        ("fp32", {"zero_stage": 2}),
        ("fp32", {"zero_stage": 3}),
    ],
)
def test_one_kernel_in_an_engine(run_values, layout):
    precision, degrees = layout
    for worst, kept in run_workers(fused_steps, 2, laid_out(run_values, precision, **degrees)):
        assert worst < 1e-5
        assert kept
