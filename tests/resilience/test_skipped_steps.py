"""A step with NaN gradients on one rank is skipped on all, as if its batch did not exist."""

from functools import partial

import pytest
import torch

from megafusion.config import parse_config
from megafusion.parallel.mesh import make_mesh
from megafusion.train.build import build_components, build_engine
from megafusion.train.config import RunConfig
from megafusion.train.loop import train_step
from tests.support.workers import run_workers

BAD = 2
"""Index of the batch whose gradient is NaN."""


def owned(values: dict, rank: int | None, bad: float = float("nan")) -> tuple[list, list]:
    """Train on five batches; returns this rank's weights and moments, and the batches that were skipped.

    rank: the one with a bad gradient; None for a run without the bad batch.
    """
    config = parse_config(RunConfig, values, "test")
    mesh = make_mesh(config.parallel)
    engine, loader = build_engine(config, mesh), build_components(config, mesh).loader
    skipped = []
    # A norm's weight, which is replicated over the tensor ranks.
    parameter = next(p for name, p in engine.stage.named_parameters() if "norm" in name)
    for number in range(5):
        batch = loader.next()
        if number == BAD and rank is None:
            continue
        is_bad = number == BAD and torch.distributed.get_rank() == rank
        hook = parameter.register_hook(lambda gradient: gradient * bad) if is_bad else None
        train_step(engine, batch, 1e-3)
        if hook:
            hook.remove()
        if engine.consensus.is_skipped:
            skipped.append(number)
    state = engine.optimizer_state.shards
    return [(m.name, m.weight.clone(), m.exp_avg.clone(), m.exp_avg_sq.clone()) for m in state], skipped


def compare(runs: list[dict], rank: int) -> list[bool]:
    """For each run, whether this rank's part equals that of a run without the bad batch."""
    answers = []
    for values in runs:
        (without, none), (with_bad, skipped) = owned(values, None), owned(values, rank)
        same = all(
            a[0] == b[0] and all(map(torch.equal, a[1:], b[1:]))
            for a, b in zip(without, with_bad, strict=True)
        )
        answers.append(same and none == [] and skipped == [BAD])
    return answers


def laid_out(values: dict, precision: str = "fp32", **parallel) -> dict:
    train = {**values["train"], "precision": precision, "micro_batch_size": 1}
    return {**values, "train": train, "parallel": parallel}


def test_two_ranks(run_values):
    runs = [
        laid_out(run_values, zero_stage=3),
        laid_out(run_values, "bf16", zero_stage=2),
        laid_out(run_values, "bf16", zero_stage=2, offload_optimizer=True),
        laid_out(run_values, tensor=2),
        laid_out(run_values, "bf16", pipeline=2),
    ]
    assert run_workers(compare, 2, runs, 1) == [[True] * len(runs)] * 2


@pytest.mark.full
def test_two_ranks_of_other_zero_stages(run_values):
    """ZeRO 0 and 1, for which ZeRO 2 and 3 above stand."""
    runs = [
        laid_out(run_values, zero_stage=0),
        laid_out(run_values, zero_stage=1),
        laid_out(run_values, "bf16", zero_stage=1),
    ]
    assert run_workers(compare, 2, runs, 1) == [[True] * len(runs)] * 2


@pytest.mark.slow
def test_every_engine_and_either_rank(run_values):
    deeper = run_values | {"model": run_values["model"] | {"num_layers": 4}}
    runs = [
        *(laid_out(run_values, zero_stage=stage) for stage in range(4)),
        *(laid_out(run_values, "bf16", zero_stage=stage) for stage in (1, 2, 3)),
        *(laid_out(run_values, zero_stage=stage, offload_optimizer=True) for stage in (1, 2, 3)),
        *(laid_out(run_values, "bf16", zero_stage=stage, offload_optimizer=True) for stage in (1, 2, 3)),
        *(laid_out(run_values, precision, tensor=2) for precision in ("fp32", "bf16")),
        laid_out(run_values, ulysses=2),
        laid_out(run_values, pipeline=2, zero_stage=0),
        *(laid_out(deeper, precision, pipeline=2, virtual_stages=2) for precision in ("fp32", "bf16")),
        *(laid_out(run_values, precision, pipeline=2) for precision in ("fp32", "bf16")),
    ]
    for rank in (0, 1):
        assert run_workers(compare, 2, runs, rank) == [[True] * len(runs)] * 2


@pytest.mark.slow
def test_tensor_and_pipeline_ranks(run_values):
    runs = [laid_out(run_values, pipeline=2, tensor=2)]
    for rank in (1, 2):
        assert run_workers(partial(compare, rank=rank), 4, runs) == [[True]] * 4
