"""torch.compile makes one graph of each block, with parallel layers and checkpointing."""

from functools import partialmethod

import pytest
from torch import nn
from torch._dynamo.utils import counters

from megafusion.config import parse_config
from megafusion.parallel.mesh import make_mesh
from megafusion.train.build import build_engine
from megafusion.train.config import RunConfig
from megafusion.train.loop import train_step
from tests.parallel.cases import Batches
from tests.parallel.matrix import Case
from tests.support.marks import full
from tests.support.workers import run_workers

CASES = {
    "one": (1, {}, "none"),
    "tp2-sp-selective": (2, {"tensor": 2, "sequence": True}, "selective"),
    "pp2-full": (2, {"pipeline": 2}, "full"),
    "dp2-zero3-selective": (2, {"zero_stage": 3}, "selective"),
}


def graphs(values: dict) -> tuple[int, dict]:
    """Number of graphs of a step, and the reasons of graph breaks; captured without code generation."""
    nn.Module.compile = partialmethod(nn.Module.compile, backend="aot_eager")
    config = parse_config(RunConfig, values, "test")
    mesh = make_mesh(config.parallel)
    train_step(build_engine(config, mesh), Batches(values, mesh).next(), 1e-3)
    return counters["stats"]["unique_graphs"], dict(counters["graph_break"])


@pytest.mark.parametrize("name", full(*CASES))
def test_a_block_is_one_graph(shards, vae_folder, tmp_path, name):
    world, degrees, recompute = CASES[name]
    train = {"compile": True, "recompute": recompute}
    for num_graphs, broken in run_workers(
        graphs, world, Case(name, world, degrees, train=train).values(shards, vae_folder, tmp_path)
    ):
        assert num_graphs > 0
        assert not broken
