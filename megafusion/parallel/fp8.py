"""8-bit matrix products in the blocks, by transformer-engine, with the same tensor-parallel shards.

Each tensor is scaled by its current maximum (current scaling), so a checkpoint has no scaling state.
This project has not yet run it on a GPU: see docs/parallelism.md.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megafusion.errors import UserError
from megafusion.model.transformer import Block
from megafusion.model.weights import declare
from megafusion.model.wrapper import Wrapper
from megafusion.parallel.sharding import set_shard_spec, shard_spec_of
from megafusion.parallel.tensor import ColumnParallelLinear, RowParallelLinear


def check_fp8() -> None:
    """UserError if the package or the chip is missing."""
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


class Fp8Block(Wrapper):
    """A block whose matrix products are 8-bit; group: the ranks that share a tensor's scale."""

    def __init__(self, block: Block, group: dist.ProcessGroup):
        from transformer_engine.common.recipe import Float8CurrentScaling

        super().__init__(block)
        self.recipe, self.group = Float8CurrentScaling(), group
        for module in (block.attention, block.feed_forward):
            for name, linear in list(module.named_children()):
                if isinstance(linear, nn.Linear):  # not a norm of heads
                    setattr(module, name, _in_fp8(linear))

    def forward(self, *arguments: object) -> Tensor:
        from transformer_engine.pytorch import fp8_autocast

        with fp8_autocast(enabled=True, fp8_recipe=self.recipe, fp8_group=self.group):
            return self._wrapped_module(*arguments)


def _in_fp8(linear: nn.Linear) -> nn.Module:
    """A transformer-engine layer to replace one of ours, with the same weight shapes and declaration."""
    from transformer_engine.pytorch import Linear

    layer = Linear(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        params_dtype=torch.bfloat16,
        device=linear.weight.device,
    )
    for name, parameter in linear.named_parameters():
        set_shard_spec(getattr(layer, name), shard_spec_of(parameter))
    if isinstance(linear, ColumnParallelLinear):
        layer.register_forward_pre_hook(lambda _, inputs: linear.region.gather_or_copy(*inputs))
    if isinstance(linear, RowParallelLinear):
        layer.register_forward_hook(lambda _, inputs, output: linear.region.reduce_or_scatter(output))
    return declare(layer, linear.weight_spec.sharding, linear.weight_spec.init)
