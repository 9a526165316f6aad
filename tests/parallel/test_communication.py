"""The collectives of a block, forward and backward, are those in docs/parallelism.md and no others."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megafusion.config import parse_config
from megafusion.model.transformer import block_context
from megafusion.model.transfusion import Transfusion
from megafusion.parallel.mesh import make_mesh
from megafusion.parallel.parallelize import parallelize
from megafusion.sequence.intervals import Intervals
from megafusion.train.config import RunConfig
from tests.parallel.matrix import Case
from tests.support.marks import full
from tests.support.workers import run_workers

ROWS, LENGTH, WIDTH, HEADS, KV_HEADS, RANKS = 2, 96, 32, 8, 4, 2
STREAM = ROWS * LENGTH * WIDTH * 4
"""Bytes of the residual stream of a micro-batch."""


class Sent(TorchDispatchMode):
    """Counts collectives and the bytes of their whole tensors."""

    def __init__(self):
        super().__init__()
        self.number, self.num_bytes = Counter(), Counter()

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        result = operation(*arguments, **options or {})
        namespace, _, name = str(operation).partition(".")
        name = name.partition(".")[0]
        if namespace in ("_c10d_functional", "c10d") and name != "wait_tensor":
            largest = max(t.numel() * t.element_size() for t in (arguments[0], result) if torch.is_tensor(t))
            self.number[name] += 1
            self.num_bytes[name] += largest
        return result


def one_block(values: dict) -> list[tuple[dict, dict]]:
    """Counts and bytes of collectives in a block's forward, and in its backward."""
    config = parse_config(RunConfig, values, "test")
    mesh = make_mesh(config.parallel)
    with torch.device("meta"):
        model = Transfusion(config.model, config.objective)
    stage = parallelize(
        model,
        mesh,
        shape=config.sequence_shape,
        micro_batch_size=config.train.micro_batch_size,
        precision=config.train.precision,
        recompute=config.train.recompute,
        compile=False,
        seed=0,
        device=torch.device("cpu"),
    )
    slices = mesh.size("ulysses") * (mesh.size("tensor") if config.parallel.sequence else 1)
    x = torch.randn(ROWS, LENGTH // slices, WIDTH, requires_grad=True)
    positions = torch.arange(LENGTH).expand(ROWS, -1).int()
    intervals = Intervals(positions + 1, None, LENGTH)
    positions_shard = stage.sequence_shard.shard(positions)
    context = block_context(config.model, intervals, positions_shard, x.dtype, positions_shard < 0)
    with Sent() as forward:
        out = stage.blocks["0"](x, context)
    with Sent() as backward:
        out.sum().backward()
    return [(dict(sent.number), dict(sent.num_bytes)) for sent in (forward, backward)]


HEADS_SENT = ROWS * LENGTH // RANKS * WIDTH // HEADS * 4
"""Bytes of one head of a Ulysses rank's positions."""

CASES = {
    "tensor": ({"tensor": 2}, "none", {"all_reduce": (2, 2 * STREAM)}, {"all_reduce": (2, 2 * STREAM)}),
    "tensor-selective": (
        {"tensor": 2},
        "selective",
        {"all_reduce": (2, 2 * STREAM)},
        {"all_reduce": (2, 2 * STREAM)},
    ),
    "tensor-full": (
        {"tensor": 2},
        "full",
        {"all_reduce": (2, 2 * STREAM)},
        {"all_reduce": (3, 3 * STREAM)},
    ),
    "sequence": (
        {"tensor": 2, "sequence": True},
        "none",
        {"all_gather_into_tensor": (2, 2 * STREAM), "reduce_scatter_tensor": (2, 2 * STREAM)},
        {
            "all_gather_into_tensor": (2, 2 * STREAM),
            "reduce_scatter_tensor": (2, 2 * STREAM),
            "all_reduce": (2, 2 * WIDTH * 4),  # the gradients of the two norms
        },
    ),
    "ulysses": (
        {"ulysses": 2},
        "none",
        {"alltoall_base_": (4, (2 * HEADS + 2 * KV_HEADS) * HEADS_SENT)},
        {"alltoall_base_": (4, (2 * HEADS + 2 * KV_HEADS) * HEADS_SENT)},
    ),
}


QUICK = ["sequence"]


@pytest.mark.parametrize("name", [*QUICK, *full(*(name for name in CASES if name not in QUICK))])
def test_a_block_sends_the_documented_bytes(shards, vae_folder, tmp_path, name):
    degrees, recompute, forward, backward = CASES[name]
    values = Case(name, RANKS, degrees, train={"recompute": recompute}).values(shards, vae_folder, tmp_path)
    for rank in run_workers(one_block, RANKS, values):
        for (number, num_bytes), expected in zip(rank, (forward, backward), strict=True):
            assert {key: (number[key], num_bytes[key]) for key in number} == expected
