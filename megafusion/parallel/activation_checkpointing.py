"""Activation checkpointing: a block's backward pass recomputes activations instead of keeping them."""

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from megafusion.parallel.config import Recompute

# Costly to compute or to communicate again; everything else in a block is cheap or, as attention, large.
# (Ulysses' all-to-alls write into buffers, which cannot be saved: they are sent again.)
_SAVED = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops._c10d_functional.all_reduce.default,
    torch.ops._c10d_functional.all_gather_into_tensor.default,
    torch.ops._c10d_functional.reduce_scatter_tensor.default,
    torch.ops._c10d_functional.wait_tensor.default,
}


def checkpointed(block: nn.Module, recompute: Recompute) -> nn.Module:
    """A block that saves its input alone ("full"), or matrix products and collectives too ("selective")."""
    options: dict[str, Any] = {}
    if recompute == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    drops = any(isinstance(module, nn.Dropout) for module in block.modules())
    return checkpoint_wrapper(block, preserve_rng_state=drops, **options)


def _policy(context: object, operation: object, *arguments: object, **options: object) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _SAVED else CheckpointPolicy.PREFER_RECOMPUTE
