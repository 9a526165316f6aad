"""8-bit matrix products in the blocks, by transformer-engine, with the shards that tensor parallelism made.

Scales are found anew for each tensor (current scaling), so a checkpoint has no scaling state to keep.
Not yet run on a GPU by this project: see docs/parallelism.md.
"""

from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megafusion.errors import UserError
from megafusion.model.transformer import Block, FusedLinear
from megafusion.parallel.sharding import set_shard_spec, shard_spec_of
from megafusion.parallel.tensor import RowParallelLinear


def check_fp8() -> None:
    """UserError where the package or the chip is not there."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9):
        raise UserError(
            "train.precision: fp8 needs an NVIDIA GPU of compute capability 8.9 or later; use bf16"
        )
    try:
        import transformer_engine.pytorch  # noqa: F401
    except ImportError as error:
        raise UserError(
            "train.precision: fp8 needs transformer-engine; pip install 'megafusion[gpu]', or use bf16"
        ) from error


def use_fp8(block: Block, group: dist.ProcessGroup) -> None:
    """Let a block's matrices be multiplied in 8 bits; group: the ranks that share a tensor's scale."""
    from transformer_engine.common.recipe import Float8CurrentScaling
    from transformer_engine.pytorch import fp8_autocast

    for part in (block.attention, block.feed_forward):
        for name, linear in list(part.named_children()):
            setattr(part, name, _in_fp8(linear))
    forward, recipe = block.forward, Float8CurrentScaling()

    def in_autocast(*arguments: object) -> Tensor:
        with fp8_autocast(enabled=True, fp8_recipe=recipe, fp8_group=group):
            return forward(*arguments)

    block.forward = in_autocast


def _in_fp8(linear: nn.Linear) -> nn.Module:
    """A transformer-engine layer in the place of one of ours, its weight laid out alike."""
    kind = _kinds()[type(linear)]
    layer = kind(
        linear.in_features,
        linear.out_features,
        bias=False,
        params_dtype=torch.bfloat16,
        device=linear.weight.device,
    )
    layer.sizes, layer.region = getattr(linear, "sizes", None), getattr(linear, "passage", None)
    set_shard_spec(layer.weight, shard_spec_of(linear.weight))
    return layer


@cache
def _kinds() -> dict[type, type]:
    """What stands for what; made when the package is first wanted."""
    from transformer_engine.pytorch import Linear

    class Fused(Linear):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return super().forward(x).split(self.sizes, dim=-1)

    class RowParallel(Linear):
        def forward(self, x: Tensor) -> Tensor:
            return self.region.reduce_or_scatter(super().forward(x))

    return {nn.Linear: Linear, FusedLinear: Fused, RowParallelLinear: RowParallel}
