"""The random start of every parameter, each from a generator of its own.

A value depends on the seed and the parameter's name alone, so that a process which holds some of the
layers, or a part of each, starts from the same model as one that holds all.
"""

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


def named_owners(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Each parameter's full name, the module that holds it, and its name there."""
    for prefix, module in model.named_modules():
        for key, _ in module.named_parameters(recurse=False):
            yield f"{prefix}.{key}" if prefix else key, module, key


def initial_value(name: str, owner: nn.Module, shape: torch.Size, num_layers: int, seed: int) -> Tensor:
    """Llama-like: matrices normal with deviation 0.02, 1/sqrt(2 layers) of it on residual outputs.

    Convolutions start as PyTorch starts them (He et al., arXiv 1502.01852); norms at one, biases at zero.
    shape: the parameter's whole shape, of which the owner may hold a part.
    """
    value = torch.zeros(shape, device="cpu")
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    if isinstance(owner, nn.Conv2d):
        if value.ndim > 1:
            return nn.init.kaiming_uniform_(value, a=5**0.5, generator=generator)
        bound = owner.weight[0].numel() ** -0.5
        return value.uniform_(-bound, bound, generator=generator)
    if value.ndim > 1:
        is_residual = name.endswith(("attention.out.weight", "feed_forward.down.weight"))
        deviation = 0.02 / (2 * num_layers) ** 0.5 if is_residual else 0.02
        return value.normal_(std=deviation, generator=generator)
    return value.fill_(1) if name.endswith(".weight") else value


@torch.no_grad()
def initialize(model: nn.Module, num_layers: int, seed: int) -> None:
    """Give every parameter of a whole model its random start, in place."""
    for name, owner, key in named_owners(model):
        parameter = getattr(owner, key)
        parameter.copy_(initial_value(name, owner, parameter.shape, num_layers, seed))
