"""Checkpoints: any topology loads what any other saved, bit for bit, and a save is whole or not there."""

import json
import os
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from megafusion.errors import UserError
from megafusion.train.checkpoint import Checkpointer, complete_checkpoints, load_ema, verify_checkpoint
from tests.train.engines import BF16, Model, Run, Topology, contents, forward_weights, make_run, steps_taken
from tests.workers import WorkersFailed, run_workers

TOPOLOGIES = [
    Topology(1, 0),
    Topology(1, 1),
    Topology(2, 1),
    Topology(2, 2),
    Topology(2, 3),
    Topology(4, 1),
]
LOW_PRECISION = [Topology(2, 1, BF16), Topology(2, 2, BF16), Topology(2, 3, BF16)]
OFFLOADED = [
    Topology(2, stage, {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}) for stage in (1, 2, 3)
]


def checkpointer_of(run: Run, folder: Path, keep_last: int = 2, keep_every: int = 0) -> Checkpointer:
    return Checkpointer(folder, run.engine, run.owned, run.ema, keep_last, keep_every)


def save(checkpointer: Checkpointer, step: int) -> None:
    state = {"step": step, "topology": {"world_size": dist.get_world_size()}}
    checkpointer.save(state, {"batch_number": step, "streams": {str(dist.get_rank()): {"at": step}}})


def save_and_go_on(topology: Topology, folder: Path) -> tuple[dict, list[float]]:
    """Three steps, a save, two more: what stood at the save, and the losses after it."""
    run = make_run(topology)
    for number in (1, 2, 3):
        run.step(number)
    with checkpointer_of(run, folder) as checkpointer:
        before = contents(run)
        save(checkpointer, 3)
        losses = [run.step(number) for number in (4, 5)]  # while the thread writes
    return before, losses


def load_each(topology: Topology, folders: list[Path]) -> list[tuple[dict, list[float]]]:
    """Into one engine, one after the other: what stands there after it, and the next losses."""
    run, found = make_run(topology, seed=1), []
    for folder in folders:
        checkpointer = checkpointer_of(run, folder)
        state = checkpointer.load(folder / "step-00000003")
        assert state["step"] == 3
        assert steps_taken(run) == {3.0}
        after = contents(run)
        for name, weight in forward_weights(run).items():
            assert torch.equal(weight, after[f"model.{name}"].to(weight.dtype)), name
        found.append((after, [run.step(number) for number in (4, 5)]))
    return found


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[Topology, tuple]:
    """A checkpoint of each topology, with what it should hold and the losses that followed."""
    found = {}
    for topology in TOPOLOGIES + LOW_PRECISION:
        folder = tmp_path_factory.mktemp(str(topology))
        found[str(topology)] = (folder, *run_workers(save_and_go_on, topology.data, topology, folder)[0])
    return found


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=str)
def test_every_topology_loads_every_other_bit_for_bit(saved, topology):
    sources = [saved[str(source)] for source in TOPOLOGIES]
    by_rank = run_workers(load_each, topology.data, topology, [folder for folder, _, _ in sources])
    for found in by_rank:
        for (after, losses), (_, before, losses_then) in zip(found, sources, strict=True):
            assert_same(after, before)
            assert losses == pytest.approx(losses_then, abs=1e-5)


@pytest.mark.parametrize("topology", [*LOW_PRECISION, Topology(1, 1), *OFFLOADED], ids=str)
def test_masters_in_float32_under_weights_in_bfloat16_or_an_optimizer_on_the_host(saved, topology):
    sources = [saved[str(source)] for source in LOW_PRECISION]
    by_rank = run_workers(load_each, topology.data, topology, [folder for folder, _, _ in sources])
    for found in by_rank:
        for (after, losses), (_, before, losses_then) in zip(found, sources, strict=True):
            assert_same(after, before)
            assert losses == pytest.approx(losses_then, abs=2e-2)
