"""The start of a whole model on one device, as every topology has it."""

import torch
from torch import nn

from megafusion.model.weights import initial_value, named_weights


@torch.no_grad()
def initialize(model: nn.Module, num_layers: int, seed: int) -> None:
    """Initialize every parameter of a whole model in place."""
    for weight in named_weights(model):
        parameter = getattr(weight.owner, weight.key)
        parameter.copy_(initial_value(weight, parameter.shape, num_layers, seed))
