"""AdamW with two parameter groups, and the learning-rate schedule."""

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import nn

from megafusion.config import Config

Decay = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Config):
    """AdamW (arXiv 1711.05101) with warm-up and cosine decay."""

    learning_rate: float = Field(3e-4, gt=0)
    """Peak learning rate, reached after the warm-up."""
    final_learning_rate: float = Field(1.5e-5, ge=0)
    """Learning rate at the last step, where the cosine ends."""
    num_warmup_steps: int = Field(4000, ge=0)
    """Steps of linear warm-up."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """Decay rates of the first and the second moment."""
    epsilon: float = Field(1e-8, gt=0)
    """Added to the square root of the second moment."""
    weight_decay: float = Field(0.1, ge=0)
    """Weight decay of matrices and convolutions; vectors (biases, norms) have none."""
    gradient_clip: float = Field(1.0, ge=0)
    """Maximum global gradient norm; 0 disables clipping."""


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices and convolutions, and without on vectors."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=config.betas, eps=config.epsilon, fused=True
    )


def learning_rate(step: int, num_steps: int, config: OptimizerConfig) -> float:
    """Learning rate of the update after `step` updates: a pure function, so no scheduler state is saved."""
    if step < config.num_warmup_steps:
        return config.learning_rate * (step + 1) / config.num_warmup_steps
    progress = (step - config.num_warmup_steps) / max(1, num_steps - config.num_warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.final_learning_rate + (config.learning_rate - config.final_learning_rate) * cosine
