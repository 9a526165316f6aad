"""The random start of every parameter, each from a generator of its own.

A value depends on the seed and the parameter's name alone, so that a process which holds some of the
layers, or a shard of each, starts from the same model as one that holds all.
"""

import hashlib

import torch
from torch import Tensor, nn

from megafusion.model.weights import Weight, named_weights


def initial_value(weight: Weight, shape: torch.Size, num_layers: int, seed: int) -> Tensor:
    """Llama-like: matrices normal with deviation 0.02, 1/sqrt(2 layers) of it on residual outputs.

    Convolutions start as PyTorch starts them (He et al., arXiv 1502.01852); norms at one, biases at zero.
    shape: the parameter's whole shape, of which the owner may hold a shard.
    """
    value = torch.zeros(shape, device="cpu")
    digest = hashlib.sha256(f"{seed} {weight.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    match weight.init:
        case "normal":
            return value.normal_(std=0.02, generator=generator)
        case "residual":
            return value.normal_(std=0.02 / (2 * num_layers) ** 0.5, generator=generator)
        case "ones":
            return value.fill_(1)
        case "zeros":
            return value
        case "conv" if value.ndim > 1:
            return nn.init.kaiming_uniform_(value, a=5**0.5, generator=generator)
        case "conv":
            bound = weight.owner.weight[0].numel() ** -0.5
            return value.uniform_(-bound, bound, generator=generator)


@torch.no_grad()
def initialize(model: nn.Module, num_layers: int, seed: int) -> None:
    """Give every parameter of a whole model its random start, in place."""
    for weight in named_weights(model):
        parameter = getattr(weight.owner, weight.key)
        parameter.copy_(initial_value(weight, parameter.shape, num_layers, seed))
