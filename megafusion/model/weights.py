"""Declarations of how a module's weights start and how tensor-parallel ranks hold them.

A constructor declares them beside the module that it makes, so that a new kind of module needs no change here
or in parallel/.
"""

import hashlib
from collections.abc import Iterator
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from megafusion.model.wrapper import canonical_name

Module = TypeVar("Module", bound=nn.Module)
Init = Literal["normal", "residual", "ones", "zeros", "conv"]


class Replicated(NamedTuple):
    """Every tensor rank holds the whole weight of a module whose input the ranks may share along a dimension.

    Each rank then has a partial gradient: for positions under sequence parallelism, else always.
    """

    input: Literal["positions", "heads", "images"]


Sharding = Literal["column", "row", "vocab"] | Replicated
"""Megatron's column-parallel linear layer (a rank holds a slice of every fused layer's outputs), row-parallel
linear layer (of the inputs), vocabulary-parallel embedding or head (a range of the vocabulary)."""


class WeightSpec(NamedTuple):
    """The declaration of a module; init is None for the usual start of its class."""

    sharding: Sharding
    init: Init | None


class Weight(NamedTuple):
    """A parameter of a model: its canonical name, its owner and its name there, and its declaration."""

    name: str
    owner: nn.Module
    key: str
    sharding: Sharding
    init: Init


def declare(module: Module, sharding: Sharding, init: Init | None = None) -> Module:
    """Declare the weights of a module and of all modules in it that have no declaration of their own."""
    module.weight_spec = WeightSpec(sharding, init)
    return module


def named_weights(model: nn.Module) -> Iterator[Weight]:
    """Every parameter with the declaration of its module, or of the nearest module around that.

    A parameter that two modules share comes once, under its first name, as in `named_parameters`.
    """
    specs: dict[str, WeightSpec | None] = {}
    seen: set[nn.Parameter] = set()
    for prefix, module in model.named_modules():
        spec = specs[prefix] = getattr(module, "weight_spec", None) or specs.get(prefix.rpartition(".")[0])
        for key, parameter in module.named_parameters(recurse=False):
            if parameter in seen:
                continue
            seen.add(parameter)
            name = canonical_name(f"{prefix}.{key}" if prefix else key)
            assert spec is not None, f"{name}: the module that makes it must declare it (model/weights.py)"
            yield Weight(name, module, key, spec.sharding, spec.init or _default_init(module, key))


def _default_init(owner: nn.Module, key: str) -> Init:
    if isinstance(owner, nn.Conv2d):
        return "conv"
    is_norm = isinstance(owner, nn.RMSNorm | nn.LayerNorm | nn.GroupNorm)
    return "zeros" if key.endswith("bias") else "ones" if is_norm else "normal"


def initial_value(weight: Weight, shape: torch.Size, num_layers: int, seed: int) -> Tensor:
    """The start of a parameter, from a generator seeded by `seed` and its name: the same on any topology.

    normal: std 0.02; residual: that over sqrt(2 num_layers), for outputs added to the residual stream; conv:
    PyTorch's (He et al., arXiv 1502.01852). shape: of the whole parameter; the owner may hold a shard.
    """
    value = torch.empty(shape, device="cpu")
    digest = hashlib.sha256(f"{seed} {weight.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    if weight.init == "conv" and value.ndim > 1:
        return nn.init.kaiming_uniform_(value, a=5**0.5, generator=generator)
    if weight.init == "conv":
        bound = weight.owner.weight[0].numel() ** -0.5
        return value.uniform_(-bound, bound, generator=generator)
    if weight.init in ("ones", "zeros"):
        return value.fill_(weight.init == "ones")
    std = 0.02 / (2 * num_layers) ** 0.5 if weight.init == "residual" else 0.02
    return value.normal_(std=std, generator=generator)
