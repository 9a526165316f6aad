"""A checkpoint of any topology loads in any other: weights, moments and averages are bitwise equal."""

from pathlib import Path

import pytest
import torch

from megafusion.checkpoint.config import CheckpointConfig
from megafusion.checkpoint.folder import KINDS
from megafusion.checkpoint.manager import CheckpointManager
from megafusion.config import parse_config
from megafusion.engine.ema import Ema
from megafusion.parallel.mesh import make_mesh
from megafusion.train.build import build_components, build_engine
from megafusion.train.config import RunConfig
from megafusion.train.loop import train_step
from tests.parallel.cases import LEARNING_RATE
from tests.parallel.matrix import FROZEN, LORA, Case
from tests.support.marks import full
from tests.support.runs import tensors
from tests.support.workers import run_workers

TOPOLOGIES = {
    "one": (1, {}),
    "tp2": (2, {"tensor": 2}),
    "pp2": (2, {"pipeline": 2}),
    "tp2-pp2": (4, {"tensor": 2, "pipeline": 2}),
    "pp2-v2": (2, {"pipeline": 2, "virtual_stages": 2}),
    "dp2-zero3": (2, {"zero_stage": 3}),
    "dp4": (4, {}),
}
NUM_BEFORE, NUM_AFTER = 4, 5


class Training:
    """A run at a topology that can be saved, loaded and stepped."""

    def __init__(self, values: dict, folder: Path):
        config = parse_config(RunConfig, values, "test")
        mesh = make_mesh(config.parallel)
        self.loader = build_components(config, mesh).loader
        self.state = self.loader.state_dict()
        self.engine = build_engine(config, mesh)
        state = self.engine.optimizer_state
        self.ema = Ema(state.shards, 0.9)
        self.manager = CheckpointManager(folder, state, self.ema, CheckpointConfig(keep_last=100))
        self.step = 0

    def run(self, num_steps: int) -> list[list[float]]:
        """Losses of the next steps."""
        losses = []
        for _ in range(num_steps):
            batch = self.loader.next()
            self.step, self.state = self.step + 1, self.loader.state_dict()
            update = self.ema.after(self.step)
            losses.append([float(x) for x in train_step(self.engine, batch, LEARNING_RATE, update)])
        return losses

    def save(self) -> None:
        self.manager.save({"step": self.step}, self.state)
        self.manager.wait()

    def load(self, checkpoint: Path) -> None:
        state = self.manager.load(checkpoint)
        self.step, self.state = state["step"], state["data"]
        self.loader.load_state_dict(self.state)


def save_and_continue(values: dict, folder: Path) -> list[list[float]]:
    """Train, save a checkpoint, and return the losses of the next steps."""
    training = Training(values, folder)
    training.run(NUM_BEFORE)
    training.save()
    return training.run(NUM_AFTER)


def load_each(values: dict, checkpoints: dict[str, Path], folder: Path) -> dict[str, list[list[float]]]:
    """Load each checkpoint, save it again from this topology, and return the losses of the next steps."""
    losses = {}
    training = Training(values, folder)
    for name, checkpoint in checkpoints.items():
        training.load(checkpoint)
        training.manager.folder = folder / name
        training.save()
        losses[name] = training.run(NUM_AFTER)
    return losses


class Saved(dict):
    """Losses after the checkpoint of a topology, which is trained and saved when first asked for."""

    def __init__(self, folder: Path, *paths: Path):
        super().__init__()
        self.folder, self.paths = folder, paths

    def values(self, name: str) -> dict:
        world, degrees = TOPOLOGIES[name]
        return Case(name, world, degrees).values(*self.paths, self.folder / "run")

    def __missing__(self, name: str) -> list[list[float]]:
        world, _ = TOPOLOGIES[name]
        self[name] = run_workers(save_and_continue, world, self.values(name), self.folder / "saved" / name)[0]
        return self[name]


@pytest.fixture(scope="module")
def saved(shards, vae_folder, tmp_path_factory) -> Saved:
    return Saved(tmp_path_factory.mktemp("checkpoints"), shards, vae_folder)


# Tensor and pipeline shards from ZeRO 3's flat ones stand for every other pair.
@pytest.mark.parametrize(
    ("target", "sources"),
    [
        pytest.param("tp2-pp2", ["dp2-zero3"], id="tp2-pp2-from-dp2-zero3"),
        *(pytest.param(name, list(TOPOLOGIES), id=name, marks=pytest.mark.full) for name in TOPOLOGIES),
    ],
)
def test_each_topology_resumes_from_every_other(saved, tmp_path, target, sources):
    losses = {name: saved[name] for name in sources}
    step = f"step-{NUM_BEFORE:08d}"
    checkpoints = {name: saved.folder / "saved" / name / step for name in sources}
    world, _ = TOPOLOGIES[target]
    for found in run_workers(load_each, world, saved.values(target), checkpoints, tmp_path):
        for name in sources:
            torch.testing.assert_close(
                torch.tensor(found[name]), torch.tensor(losses[name]), rtol=1e-5, atol=1e-7
            )
    for name, checkpoint in checkpoints.items():
        before, after = tensors(checkpoint), tensors(tmp_path / name / step)
        assert before.keys() == after.keys()
        assert {key.partition(".")[0] for key in before} == set(KINDS)
        for key, value in before.items():
            assert torch.equal(value, after[key]), (name, key)


PARTS = {
    "frozen": {"freeze": FROZEN},
    "frozen-bf16": {"freeze": FROZEN, "precision": "bf16"},
    "lora": {"lora": LORA},
}
"""Keys of runs that train a part of the model."""


@pytest.mark.parametrize(
    ("part", "source", "target"),
    full(
        ("frozen", "dp2-zero3", "tp2-pp2"),
        ("frozen", "tp2-pp2", "dp2-zero3"),
        ("frozen-bf16", "dp2-zero3", "tp2"),
        ("frozen-bf16", "tp2", "dp2-zero3"),
        ("lora", "dp2-zero3", "tp2-pp2"),
        ("lora", "tp2-pp2", "dp2-zero3"),
    ),
)
def test_a_run_that_trains_a_part_resumes_at_another_topology(
    shards, vae_folder, tmp_path, part, source, target
):
    def values(name: str) -> dict:
        world, degrees = TOPOLOGIES[name]
        return Case(name, world, degrees, train=PARTS[part]).values(shards, vae_folder, tmp_path / "run")

    losses, *_ = run_workers(save_and_continue, TOPOLOGIES[source][0], values(source), tmp_path / "saved")
    checkpoint = tmp_path / "saved" / f"step-{NUM_BEFORE:08d}"
    arguments = values(target), {"again": checkpoint}, tmp_path
    for found in run_workers(load_each, TOPOLOGIES[target][0], *arguments):
        error = 1e-2 if "bf16" in part else 1e-5
        torch.testing.assert_close(torch.tensor(found["again"]), torch.tensor(losses), rtol=error, atol=1e-7)
    before, after = tensors(checkpoint), tensors(tmp_path / "again" / checkpoint.name)
    assert before.keys() == after.keys()
    kinds = {kind: {k.partition(".")[2] for k in before if k.startswith(f"{kind}.")} for kind in KINDS}
    assert kinds["ema"] == kinds["exp_avg"] == kinds["exp_avg_sq"] < kinds["model"]
    for key, value in before.items():
        assert torch.equal(value, after[key]), key
        is_frozen = key.partition(".")[2] not in kinds["ema"]
        assert value.dtype == (torch.bfloat16 if is_frozen and "bf16" in part else torch.float32)
