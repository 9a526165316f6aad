"""A rank's weights and optimizer state have the sizes that the formula gives, at each degree."""

import pytest

from megafusion.config import parse_config
from megafusion.engine.ema import Ema
from megafusion.parallel.memory import state_bytes
from megafusion.parallel.mesh import make_mesh
from megafusion.train.build import build_engine
from megafusion.train.config import RunConfig
from megafusion.train.loop import train_step
from tests.parallel.cases import Batches
from tests.parallel.matrix import Case
from tests.support.marks import full
from tests.support.workers import run_workers

CASES = {
    "one-zero0": (1, {"zero_stage": 0}, "fp32"),
    "one": (1, {}, "fp32"),
    "tp2": (2, {"tensor": 2}, "fp32"),
    "pp2": (2, {"pipeline": 2}, "fp32"),
    "pp2-v2": (2, {"pipeline": 2, "virtual_stages": 2}, "fp32"),
    "dp2-zero0": (2, {"zero_stage": 0}, "fp32"),
    "dp2-zero1": (2, {"zero_stage": 1}, "fp32"),
    "dp2-zero1-bf16": (2, {"zero_stage": 1}, "bf16"),
    "dp2-zero2": (2, {"zero_stage": 2}, "fp32"),
    "dp2-zero3": (2, {"zero_stage": 3}, "fp32"),
    "ulysses2": (2, {"ulysses": 2}, "fp32"),
    "tp2-dp2-zero3": (4, {"tensor": 2, "zero_stage": 3}, "bf16"),
    "tp2-pp2": (4, {"tensor": 2, "pipeline": 2}, "fp32"),
}
FROZEN = ["blocks.[12].*", "*.embedding.weight"]


def state_sizes(values: dict) -> tuple[list[int], list[int]]:
    """Bytes of weights, optimizer and average: measured, and by the formula."""
    config = parse_config(RunConfig, values, "test")
    mesh = make_mesh(config.parallel)
    engine = build_engine(config, mesh)
    owned = engine.optimizer_state.shards
    ema = Ema(owned, 0.9)
    train_step(engine, Batches(values, mesh).next(), 1e-3)
    parameters = list(engine.stage.parameters())
    if config.parallel.zero_stage == 3:
        kept = [p for p in parameters if p.ds_persist]
        weights = [p.ds_tensor for p in parameters if not p.ds_persist] + kept
    else:
        weights = parameters
    optimizer = engine._deepspeed.optimizer
    adamw = getattr(optimizer, "optimizer", optimizer)
    states = [t for s in adamw.state.values() for t in s.values() if t.numel() > 1]
    if config.parallel.zero_stage:
        states += list(adamw.state)
    kinds = (weights, states, ema.fragments)
    measured = [sum(t.numel() * t.element_size() for t in tensors) for tensors in kinds]
    assert all((p.grad is None) or p.requires_grad for p in parameters)
    if buffers := getattr(optimizer, "fp32_groups_gradients_flat", None):
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        assert sum(buffer.numel() for buffer in buffers) == pytest.approx(trained, rel=0.01)
    return measured, list(state_bytes(engine.stage, mesh, 4 if config.train.precision == "fp32" else 2))


QUICK = ["pp2"]
"""One stands for all; tests/plan holds the same formula."""


SIZES = [(name, freeze) for freeze in ((), FROZEN) for name in CASES]
QUICK_SIZES = [*((name, ()) for name in QUICK)]


@pytest.mark.parametrize(
    ("name", "freeze"), [*QUICK_SIZES, *full(*(case for case in SIZES if case not in QUICK_SIZES))]
)
def test_sizes_are_those_of_the_formula(shards, vae_folder, tmp_path, name, freeze):
    world, degrees, precision = CASES[name]
    values = Case(name, world, degrees, "unet", {"precision": precision}).values(shards, vae_folder, tmp_path)
    values["model"] |= {"hidden_size": 64, "ffn_hidden_size": 256}
    values["train"] |= {"freeze": freeze}
    for measured, formula in run_workers(state_sizes, world, values):
        assert measured == pytest.approx(formula, rel=0.02)
        assert sum(measured) > 1_000_000


# The product stands for its two degrees, which the full case separates.
@pytest.mark.parametrize("names", full((("one", "tp2", "pp2", "tp2-pp2"),)), ids=len)
def test_tensor_and_pipeline_ranks_replicate_no_sharded_weight(shards, vae_folder, tmp_path, names):
    """Over the ranks of one replica, the bytes of weights add up to those of the whole model."""
    totals = {}
    for name in names:
        world, degrees, _ = CASES[name]
        values = Case(name, world, degrees).values(shards, vae_folder, tmp_path)
        totals[name] = sum(measured[0] for measured, _ in run_workers(state_sizes, world, values))
    assert totals.get("pp2", totals["one"]) == totals["one"]
    # Every tensor rank has the norms and the linear adapters.
    assert totals["one"] < totals["tp2-pp2"] < 1.1 * totals["one"]
    assert totals.get("tp2", totals["tp2-pp2"]) == totals["tp2-pp2"]
