"""torch.compile divides the collectives of sequence parallelism, without changing a result.

The divided operators exist for GPUs alone. Here torch's test mode runs their definitions, on two processes.
"""

from collections import Counter

import pytest
import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
from torch._inductor.fx_passes import post_grad

from megafusion.config import parse_config
from megafusion.errors import UserError
from megafusion.parallel.mesh import make_mesh
from megafusion.train.build import build_engine
from megafusion.train.config import RunConfig
from megafusion.train.loop import train_step
from tests.parallel.cases import Batches
from tests.parallel.matrix import Case
from tests.parallel.test_mesh import refuse
from tests.support.marks import full, without_gpu
from tests.support.workers import run_workers

DEGREES = {"tensor": 2, "sequence": True}
COLLECTIVES = "all_gather_into_tensor", "reduce_scatter_tensor"
FUSED = "fused_all_gather_matmul", "fused_matmul_reduce_scatter"


def steps(values: dict) -> tuple[list[float], list[dict]]:
    """Losses and gradient norms of three steps; and the collectives in each graph that has some."""
    torch._inductor.config.force_disable_caches = True  # a graph from a cache meets no pass
    dist.is_nccl_available = lambda: True
    for name in FUSED:
        torch.library.impl(f"symm_mem::{name}", "CPU")(getattr(symmetric_memory, f"_{name}_fallback"))
    graphs, divide = [], post_grad.micro_pipeline_tp_pass

    def counted(graph: torch.fx.Graph) -> None:
        divide(graph)
        operators = Counter(
            node.target.__name__.split(".")[0] for node in graph.nodes if callable(node.target)
        )
        if found := {name: operators[name] for name in (*COLLECTIVES, *FUSED) if operators[name]}:
            graphs.append(found)

    post_grad.micro_pipeline_tp_pass = counted
    config = parse_config(RunConfig, values, "test")
    mesh = make_mesh(config.parallel)
    engine = build_engine(config, mesh)
    batches = Batches(values | {"parallel": DEGREES}, mesh)
    with symmetric_memory._test_mode():
        losses = [train_step(engine, batches.next(), 1e-3) for _ in range(3)]
    return [float(figure) for each in losses for figure in each], graphs


FORWARD = {
    "none": dict.fromkeys(FUSED, 2),
    # Backward reads their results, which selective recomputation keeps whole.
    "selective": {"all_gather_into_tensor": 2, "fused_matmul_reduce_scatter": 2},
}


@pytest.mark.parametrize("recompute", full("none", "selective"))
def test_the_collectives_of_a_block_are_divided(shards, vae_folder, tmp_path, recompute):
    train = {"compile": True, "recompute": recompute}
    plain, divided = (
        run_workers(
            steps,
            2,
            Case("tensor", 2, degrees, train=train).values(shards, vae_folder, tmp_path),
            timeout=500,
        )
        for degrees in (DEGREES, DEGREES | {"async_tensor": True})
    )
    for (expected, graphs), (found, divided_graphs) in zip(plain, divided, strict=True):
        assert found == pytest.approx(expected, rel=1e-6)
        assert not graphs
        assert divided_graphs == [FORWARD[recompute], dict.fromkeys(FUSED, 2)]  # forward, backward


@pytest.mark.parametrize(
    ("degrees", "train", "reason"),
    [
        ({"sequence": False}, {"compile": True}, "set sequence to true"),
        ({}, {}, "set train.compile: true"),
        ({}, {"compile": True, "precision": "fp8"}, "no effect with train.precision fp8"),
    ],
)
def test_is_refused_where_it_would_do_nothing(shards, vae_folder, tmp_path, degrees, train, reason):
    parallel = DEGREES | {"async_tensor": True} | degrees
    values = Case("tensor", 2, parallel, train=train).values(shards, vae_folder, tmp_path)
    with pytest.raises(UserError, match=reason):
        parse_config(RunConfig, values, "test")


@without_gpu
def test_is_refused_without_a_gpu(shards, vae_folder, tmp_path):
    parallel = DEGREES | {"async_tensor": True}
    values = Case("tensor", 2, parallel, train={"compile": True}).values(shards, vae_folder, tmp_path)
    for message in run_workers(refuse, 2, values):
        assert message.startswith("parallel.async_tensor needs GPUs that read each other's memory")
