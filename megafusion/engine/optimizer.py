"""AdamW with its parameter groups, and the learning-rate schedule, which `launch` reads without torch."""

import math
from typing import TYPE_CHECKING, Any

from megafusion.engine.config import OptimizerConfig

if TYPE_CHECKING:
    import torch


def make_optimizer(model: "torch.nn.Module", config: OptimizerConfig) -> "torch.optim.AdamW":
    """AdamW with weight decay on matrices and convolutions, and without on vectors.

    A group's `lr_scale` is its learning rate over that of the schedule. model: with canonical names.
    """
    import torch

    scaled = [(config.learning_rate_scale(n), p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [
        {
            "params": [p for own, p in scaled if own == scale and (p.ndim >= 2) == decays],
            "lr_scale": scale,
            "weight_decay": config.weight_decay if decays else 0.0,
        }
        for scale in sorted({scale for scale, _ in scaled})
        for decays in (True, False)
    ]
    groups = [group for group in groups if group["params"]]  # DeepSpeed flattens no empty one
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=config.betas, eps=config.epsilon, fused=True
    )


def set_learning_rate(optimizer: Any, rate: float) -> None:
    """Set the learning rate of all groups. optimizer: of `make_optimizer`, or DeepSpeed's around it."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]


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
