"""AdamW with two parameter groups, and the learning-rate schedule, which `launch` reads without torch."""

import math
from typing import TYPE_CHECKING

from megafusion.engine.config import OptimizerConfig

if TYPE_CHECKING:
    import torch


def make_optimizer(model: "torch.nn.Module", config: OptimizerConfig) -> "torch.optim.AdamW":
    """AdamW with weight decay on matrices and convolutions, and without on vectors."""
    import torch

    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]  # DeepSpeed flattens no empty one
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=config.betas, eps=config.epsilon, fused=True
    )


def learning_rate(step: int, num_steps: int, config: OptimizerConfig) -> float:
    """Learning rate of the update after `step` updates: a pure function, so no scheduler state is saved."""
    first = config.num_warmup_steps  # of the decay
    if step < first:
        return config.learning_rate * (step + 1) / first
    if config.schedule == "constant":
        return config.learning_rate
    if config.schedule == "wsd":
        first = max(first, num_steps - round(config.decay_ratio * num_steps))
    progress = min(1.0, max(0, step - first) / max(1, num_steps - first))
    left = 1 - progress if config.schedule == "wsd" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.final_learning_rate + (config.learning_rate - config.final_learning_rate) * left
