"""The optimizer step apart from the backward pass, and how an update is skipped."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from math import inf
from typing import Any

import megafusion.device  # noqa: F401 - before deepspeed

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

from megafusion.resilience.consensus import StepConsensus


class HeldUpdate:
    """DeepSpeed's optimizer step, held back until all ranks agree to make it. DeepSpeed has no hook for it.

    A skipped update leaves weights, moments and AdamW's step count as they were, and drops the gradients.
    """

    def __init__(self, engine: DeepSpeedEngine, consensus: StepConsensus):
        self._engine, self._consensus = engine, consensus
        self._take_model_step = engine._take_model_step
        engine._take_model_step = lambda lr_kwargs=None: None
        if isinstance(optimizer := engine.optimizer, BF16_Optimizer):
            zero = torch.zeros(1, device=engine.device)
            optimizer.get_grads_for_norm = partial(_counted, optimizer.get_grads_for_norm, zero)

    def make_or_skip(self) -> None:
        """Clip and update, or skip, as the consensus decides. Called by every rank after backward."""
        self._consensus.decide(_gradients(self._engine))
        with _infinite_norm(self._engine) if self._consensus.is_skipped else nullcontext():
            self._take_model_step({})


def _gradients(engine: DeepSpeedEngine) -> list[Tensor]:
    """The gradients that this rank's optimizer would use, already reduced over data ranks."""
    optimizer = engine.optimizer
    if isinstance(optimizer, torch.optim.AdamW):
        found = [parameter.grad for parameter in engine.module.parameters()]
    elif isinstance(optimizer, BF16_Optimizer):
        found = [gradient for group in optimizer.fp32_groups_gradients for gradient in group]
    elif isinstance(optimizer, DeepSpeedZeroOptimizer) and optimizer.cpu_offload:
        found = [storage.grad for storage in optimizer.single_partition_of_fp32_groups]
    elif isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3) and optimizer.offload_optimizer:
        found = [storage.grad for storage in optimizer.fp32_partitioned_groups_flat]
    else:
        assert isinstance(optimizer, DeepSpeedZeroOptimizer | DeepSpeedZeroOptimizer_Stage3)
        found = [gradient for group in optimizer.averaged_gradients.values() for gradient in group or ()]
    return [gradient for gradient in found if gradient is not None]


def _counted(get_grads_for_norm: Callable, zero: Tensor, for_clipping: bool = False) -> Any:
    """DeepSpeed's answer, with a zero for a rank that counts no gradient: it would stack an empty list.

    So do tensor ranks but the first where all that is trained is replicated, as image adapters are.
    """
    found = get_grads_for_norm(for_clipping)
    return found if for_clipping else (found[0] or [zero], found[1])


@contextmanager
def _infinite_norm(engine: DeepSpeedEngine) -> Iterator[None]:
    """Report an infinite gradient norm to DeepSpeed, which then drops the gradients and updates nothing."""
    optimizer = engine.optimizer
    infinite = torch.tensor(inf, device=engine.device)
    if isinstance(optimizer, torch.optim.AdamW):
        # ZeRO 0 has no such path, but AdamW skips parameters without a gradient.
        owner, name, instead = engine, "clip_fp32_gradients", engine.zero_grad
    elif isinstance(optimizer, BF16_Optimizer):
        owner, name, instead = optimizer, "get_grads_for_norm", lambda: ([infinite], {})
    elif isinstance(optimizer, DeepSpeedZeroOptimizer):
        owner, name, instead = optimizer, "scaled_global_norm", lambda: infinite
    else:
        owner, name, instead = optimizer, "_get_norm_groups", lambda: [infinite]
    own = vars(owner).get(name)
    setattr(owner, name, instead)
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)
        if isinstance(optimizer, DeepSpeedZeroOptimizer):
            # With offload it keeps accumulating into bf16's sums, in which NaN would stay for ever.
            optimizer.averaged_gradients = dict.fromkeys(optimizer.averaged_gradients)
