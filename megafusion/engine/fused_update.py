"""One pass over a flat storage on a GPU: clipping, AdamW, the average and the cast to the model's precision.

It reads gradient, weight, both moments and average, 20 bytes a parameter, and writes all but the gradient,
16 bytes and 2 in bf16. Separate kernels would move 60.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megafusion.engine.optimizer_state import Storage

BLOCK = 1024
"""Four numbers a thread, in every precision: no exchange between threads before the store in bf16."""


def scalars(storage: Storage, scale: Tensor, skip: Tensor, average_weight: float) -> Tensor:
    """Numbers that the kernel reads beside the storages, float32 on the device.

    Factor of the gradient, whether to skip, AdamW's two bias corrections at the next update, how far the
    average moves. storage: one of those that are updated together.
    """
    next_step = storage.step.double() + 1
    beta1, beta2 = storage.group["betas"]
    corrections = (1 - beta1**next_step, (1 - beta2**next_step).sqrt())
    weight = torch.full_like(scale, average_weight)
    return torch.stack([scale, skip, *(value.float() for value in corrections), weight])


def fused_update(
    storage: Storage, gradient: Tensor, average: Tensor | None, model: Tensor | None, scalars: Tensor
) -> None:
    """Update a flat storage and its average in place, and the model's part of its size in its precision.

    Changes nothing where scalars say to skip. AdamW's step count stays: it is shared by several storages.
    """
    size, group = storage.weight.numel(), storage.group
    _update[(triton.cdiv(size, BLOCK),)](
        storage.weight,
        gradient,
        storage.exp_avg,
        storage.exp_avg_sq,
        average,
        model,
        scalars,
        size,
        group["lr"],
        group["lr"] * group["weight_decay"],
        1.0 - group["betas"][0],
        group["betas"][1],
        1.0 - group["betas"][1],
        group["eps"],
        HAS_AVERAGE=average is not None,
        HAS_MODEL=model is not None,
        BLOCK=BLOCK,
        num_warps=8,
    )


@triton.jit
def _update(
    weight_ptr,
    gradient_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    average_ptr,
    model_ptr,
    scalars_ptr,
    size,
    learning_rate,
    decay,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    epsilon,
    HAS_AVERAGE: tl.constexpr,
    HAS_MODEL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_updated = at < tl.where(tl.load(scalars_ptr + 1) == 0.0, size, 0)
    gradient = tl.load(gradient_ptr + at, is_updated) * tl.load(scalars_ptr)
    exp_avg = tl.load(exp_avg_ptr + at, is_updated)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + at, is_updated)
    weight = tl.load(weight_ptr + at, is_updated)
    exp_avg += one_minus_beta1 * (gradient - exp_avg)
    exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * gradient * gradient
    denominator = tl.sqrt_rn(exp_avg_sq) / tl.load(scalars_ptr + 3) + epsilon
    weight -= decay * weight
    weight -= learning_rate / tl.load(scalars_ptr + 2) * (exp_avg / denominator)
    tl.store(exp_avg_ptr + at, exp_avg, is_updated)
    tl.store(exp_avg_sq_ptr + at, exp_avg_sq, is_updated)
    tl.store(weight_ptr + at, weight, is_updated)
    if HAS_AVERAGE:
        average = tl.load(average_ptr + at, is_updated)
        moves = tl.load(scalars_ptr + 4)
        # As torch.lerp: exact at both ends.
        difference = weight - average
        average = tl.where(moves < 0.5, average + moves * difference, weight - (1.0 - moves) * difference)
        tl.store(average_ptr + at, average, is_updated)
    if HAS_MODEL:
        tl.store(model_ptr + at, weight.to(model_ptr.dtype.element_ty), is_updated)
