"""Low-rank adaptation (LoRA, arXiv 2106.09685) of the blocks' linear layers.

A layer's weight W becomes W + scale B A with A [rank, inputs] and B [outputs, rank]. A fused layer has an A
and a B for each of its parts, as in PEFT, where they are layers of their own.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megafusion.model.config import LoraConfig
from megafusion.model.transformer import FusedLinear
from megafusion.model.transfusion import Transfusion
from megafusion.model.weights import Replicated, declare
from megafusion.model.wrapper import Wrapper


class LoraLinear(Wrapper):
    """A linear layer with a trained update, declared so that tensor parallelism shards it like the layer.

    Column-parallel: A is replicated, B is sharded by outputs. Row-parallel: A is sharded by inputs, B is
    replicated. A starts as PEFT's does, B from zeros: at first the layer computes what it did.
    """

    def __init__(self, linear: nn.Linear, config: LoraConfig):
        super().__init__(linear)
        self.scale, rank, size = config.scale, config.rank, linear.in_features
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        if isinstance(linear, FusedLinear):
            a = declare(FusedLinear(size, (rank,) * len(linear.sizes)), Replicated("positions"), init="conv")
            b = [declare(FusedLinear(rank, (each,)), "column", init="zeros") for each in linear.sizes]
        else:
            a = declare(nn.Linear(size, rank, bias=False), "row", init="conv")
            up = nn.Linear(rank, linear.out_features, bias=False)
            b = [declare(up, Replicated("positions"), init="zeros")]
        self.lora_a, self.lora_b = a, nn.ModuleList(b)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.lora_a(self.dropout(x)).chunk(len(self.lora_b), dim=-1)
        updates = [b(part) for part, b in zip(parts, self.lora_b, strict=True)]
        update = updates[0] if len(updates) == 1 else torch.cat(updates, dim=-1)
        return self._wrapped_module(x) + self.scale * update


def lora_layers(model: Transfusion) -> dict[str, nn.Linear]:
    """The layers that can be adapted, by name: the linear layers of the blocks."""
    return {
        f"blocks.{name}": module
        for name, module in model.blocks.named_modules()
        if isinstance(module, nn.Linear)
    }


def add_lora(model: Transfusion, config: LoraConfig) -> Transfusion:
    """Put a LoraLinear in the place of each layer that the configuration names; returns the model."""
    for name, layer in lora_layers(model).items():
        if config.adapts(name):
            parent, _, key = name.rpartition(".")
            setattr(model.get_submodule(parent), key, LoraLinear(layer, config))
    return model


def lora_update(a: Tensor, parts: Sequence[Tensor], scale: float) -> Tensor:
    """scale B A in float32, [outputs, inputs]. a: of all parts, in their order; parts: B of each."""
    pairs = zip(parts, a.chunk(len(parts)), strict=True)
    return scale * torch.cat([b.float() @ own.float() for b, own in pairs])
