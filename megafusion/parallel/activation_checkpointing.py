"""Activation checkpointing: what a block's backward pass computes again instead of keeping."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from megafusion.parallel.config import Recompute

# Costly to compute again, or to send again; everything else of a block is cheap or, as attention, large.
# (Ulysses' exchanges write into buffers, which cannot be kept: they are sent again.)
_KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops._c10d_functional.all_reduce.default,
    torch.ops._c10d_functional.all_gather_into_tensor.default,
    torch.ops._c10d_functional.reduce_scatter_tensor.default,
    torch.ops._c10d_functional.wait_tensor.default,
}


def recompute(block: nn.Module, what: Recompute) -> None:
    """Let a block keep everything; matrix products and what was communicated; or its input alone."""
    if what == "none":
        return
    options: dict[str, Callable] = {}
    if what == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    forward = block.forward

    # A function, for torch.compile sees nothing behind functools.partial here, and would compile nothing.
    def checkpointed(*arguments: object) -> Tensor:
        return checkpoint(forward, *arguments, use_reentrant=False, preserve_rng_state=False, **options)

    block.forward = checkpointed


def _policy(context: object, operation: object, *arguments: object, **options: object) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE
