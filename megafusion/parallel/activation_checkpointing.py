"""Activation checkpointing: a block's backward pass recomputes activations instead of keeping them."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from megafusion.parallel.config import Recompute
from megafusion.parallel.wrapper import Wrapper

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


class CheckpointedBlock(Wrapper):
    """A block that saves its input alone ("full"), or matrix products and collectives too ("selective")."""

    def __init__(self, block: nn.Module, recompute: Recompute):
        super().__init__(block)
        self.options: dict[str, Any] = {}
        if recompute == "selective":
            self.options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)

    def forward(self, *arguments: object) -> Tensor:
        return checkpoint(
            self._wrapped_module,
            *arguments,
            use_reentrant=False,
            preserve_rng_state=False,
            **self.options,
        )


def _policy(context: object, operation: object, *arguments: object, **options: object) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _SAVED else CheckpointPolicy.PREFER_RECOMPUTE
