"""One optimizer step: count targets, forward and backward, agree, clip, step."""

from collections.abc import Iterator

import megafusion.device  # noqa: F401 - before deepspeed

from deepspeed.runtime.pipe.engine import PipelineEngine

from megafusion.engine.engine import Engine
from megafusion.objective.losses import Losses
from megafusion.sequence.packing import PackedBatch, with_counts


def train_step(engine: Engine, micro_batches: list[PackedBatch], learning_rate: float) -> Losses:
    """Update the weights once; returns the losses of the global batch, on the device.

    `engine.consensus` says whether the update was left out, and whether a rank wishes to stop. Raises
    UserError on every rank, before anything is done, where one has refused (and has no micro-batches).
    """
    for group in engine.deepspeed.optimizer.param_groups:
        group["lr"] = learning_rate
    counts = engine.consensus.reduce_counts(sum(batch.counts() for batch in micro_batches))
    batches = (with_counts(batch.to(engine.device), counts) for batch in micro_batches)
    if isinstance(engine.deepspeed, PipelineEngine):
        engine.deepspeed.train_batch((batch.inputs(), batch.targets()) for batch in batches)
    else:
        _plain_step(engine, batches, len(micro_batches))
    return Losses(*engine.consensus.losses.unbind())


def _plain_step(engine: Engine, batches: Iterator[PackedBatch], num_micro_batches: int) -> None:
    mesh = engine.mesh
    # The losses are shares of global means already; DeepSpeed averages once more over all of these.
    averaged_over = num_micro_batches * mesh.size("data") * mesh.size("ulysses")
    for batch in batches:
        losses: Losses = engine.deepspeed(batch)
        engine.consensus.add_losses(losses)
        engine.deepspeed.backward(losses.total * averaged_over)
        engine.deepspeed.step()
