"""A new kind of module is initialized and sharded by its own declarations, with no change in parallel/."""

import pytest
import torch
from torch import Tensor, nn

from megafusion.config import parse_config
from megafusion.model.transformer import FusedLinear, block_context
from megafusion.model.transfusion import Transfusion
from megafusion.model.weights import Replicated, declare, named_weights
from megafusion.parallel.mesh import make_mesh
from megafusion.parallel.parallelize import parallelize
from megafusion.parallel.sharding import ShardSpec, shard_spec_of
from megafusion.sequence.intervals import Intervals
from megafusion.train.config import RunConfig
from tests.parallel.matrix import Case
from tests.support.marks import full
from tests.support.workers import run_workers

ROWS, LENGTH, WIDTH, HEAD_DIM = 2, 96, 32, 4
BIAS = "blocks.0.attention.qkv.lora_b.bias"


class AdaptedQKV(nn.Module):
    """Queries, keys and values with a LoRA pair (arXiv 2106.09685), a bias and QK-norm (2302.05442)."""

    def __init__(self, base: FusedLinear):
        super().__init__()
        self.base = base
        self.lora_a = declare(nn.Linear(WIDTH, 3, bias=False), Replicated("positions"))
        self.lora_b = declare(FusedLinear(3, base.sizes, bias=True), "column", init="residual")
        self.qk_norm = declare(nn.RMSNorm(HEAD_DIM), Replicated("heads"))

    def forward(self, x_BSD: Tensor) -> Tensor:
        adapted = self.base(x_BSD) + self.lora_b(self.lora_a(x_BSD))
        q, k, v = adapted.split(self.base.sizes, dim=-1)
        q, k = (self.qk_norm(part.unflatten(-1, (-1, HEAD_DIM))).flatten(-2) for part in (q, k))
        return torch.cat([q, k, v], dim=-1)


def block_gradients(values: dict) -> dict[str, tuple[ShardSpec, Tensor, Tensor]]:
    """Spec, start and gradient of each parameter of a block on this rank."""
    config = parse_config(RunConfig, values, "test")
    mesh = make_mesh(config.parallel)
    with torch.device("meta"):
        model = Transfusion(config.model, config.objective)
        model.blocks[0].attention.qkv = AdaptedQKV(model.blocks[0].attention.qkv)
    stage = parallelize(
        model,
        mesh,
        shape=config.sequence_shape,
        micro_batch_size=ROWS,
        precision="fp32",
        recompute=config.train.recompute,
        compile=False,
        seed=0,
        device=torch.device("cpu"),
    )
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(ROWS, LENGTH, WIDTH, generator=generator) for _ in range(2))
    if config.parallel.sequence:
        x, weight = (t.chunk(mesh.size("tensor"), 1)[mesh.rank("tensor")] for t in (x, weight))
    positions = torch.arange(LENGTH).expand(ROWS, -1).int()
    intervals = Intervals(positions + 1, None, LENGTH)
    context = block_context(config.model, intervals, positions, x.dtype, positions < 0)
    (stage.blocks["0"](x, context) * weight).sum().backward()
    return {
        name: (shard_spec_of(parameter), parameter.detach(), parameter.grad)
        for name, parameter in stage.named_parameters()
        if name.startswith("blocks.0.")
    }


@pytest.mark.parametrize(
    ("sequence", "recompute"), [(True, "full"), *full((False, "none"), (False, "full"), (True, "none"))]
)
def test_starts_and_gradients_are_those_of_one_device(shards, vae_folder, tmp_path, sequence, recompute):
    def ranks(num_ranks: int, degrees: dict) -> list[dict]:
        case = Case("declared", num_ranks, degrees, train={"recompute": recompute})
        return run_workers(block_gradients, num_ranks, case.values(shards, vae_folder, tmp_path))

    (whole,) = ranks(1, {})
    for rank in ranks(2, {"tensor": 2, "sequence": sequence}):
        assert rank.keys() == whole.keys()
        for name, (spec, start, gradient) in rank.items():
            _, whole_start, whole_gradient = whole[name]
            assert whole_gradient.abs().max() > 0
            assert torch.equal(start, spec.shard(whole_start)), name
            torch.testing.assert_close(gradient, spec.shard(whole_gradient), rtol=1e-4, atol=1e-5)
        assert 2 * len(rank[BIAS][1]) == len(whole[BIAS][1])


def test_a_module_without_a_declaration_is_refused():
    with pytest.raises(AssertionError, match=r"0\.weight: the module that makes it must declare it"):
        list(named_weights(nn.Sequential(nn.Linear(2, 2))))
