"""Declarations of how a module's weights start and how tensor-parallel ranks share them.

A constructor declares them beside the module that it makes. `initialize.py` and `parallel/` read them, so
that a new kind of module needs no change there.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar

from torch import nn

Init = Literal["normal", "residual", "ones", "zeros", "conv"]
Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Column:
    """Megatron's column-parallel linear layer: each rank holds a slice of every fused layer's outputs."""


@dataclass(frozen=True)
class Row:
    """Megatron's row-parallel linear layer: each rank holds a slice of the inputs; outputs are summed."""


@dataclass(frozen=True)
class Vocab:
    """Megatron's vocabulary-parallel embedding or head: each rank holds a range of the vocabulary."""


@dataclass(frozen=True)
class Replicated:
    """Every tensor rank holds the whole weight."""

    input: Literal["positions", "heads", "images"]
    """The dimension of the module's input that the tensor ranks may share. Where they do, each has a partial
    gradient: positions under sequence parallelism, heads and images always."""


Sharding = Column | Row | Vocab | Replicated


@dataclass(frozen=True)
class WeightSpec:
    """The declaration of a module."""

    sharding: Sharding
    init: Init | None
    """None for what PyTorch's layers have in common: see `default_init`."""


class Weight(NamedTuple):
    """A parameter of a model with its declaration."""

    name: str
    """Full name."""
    owner: nn.Module
    """The module that holds it."""
    key: str
    """Its name there."""
    sharding: Sharding
    init: Init


def declare(module: Module, sharding: Sharding, init: Init | None = None) -> Module:
    """Declare the weights of a module and of all modules in it that have no declaration of their own."""
    module.weight_spec = WeightSpec(sharding, init)
    return module


def named_weights(model: nn.Module) -> Iterator[Weight]:
    """Every parameter with the declaration of its module, or of the nearest module around that."""
    specs: dict[str, WeightSpec | None] = {}
    for prefix, module in model.named_modules():
        spec = getattr(module, "weight_spec", None) or specs.get(prefix.rpartition(".")[0])
        specs[prefix] = spec
        for key, _ in module.named_parameters(recurse=False):
            name = f"{prefix}.{key}" if prefix else key
            assert spec is not None, f"{name}: the module that makes it must declare it (model/weights.py)"
            yield Weight(name, module, key, spec.sharding, spec.init or default_init(module, key))


def default_init(owner: nn.Module, key: str) -> Init:
    """Convolutions as PyTorch, other biases zero, norms one, matrices normal."""
    if isinstance(owner, nn.Conv2d):
        return "conv"
    if key == "bias":
        return "zeros"
    return "ones" if isinstance(owner, nn.RMSNorm | nn.LayerNorm | nn.GroupNorm) else "normal"
