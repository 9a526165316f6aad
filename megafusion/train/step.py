"""One optimizer step: count targets, forward and backward, clip, step."""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch import Tensor

from megafusion.objective.losses import Losses
from megafusion.sequence.packing import PackedBatch, with_counts
from megafusion.train.engine import Engine


def global_counts(micro_batches: list[PackedBatch], engine: Engine) -> Tensor:
    """int64 [2]: text targets and images of the global batch, summed over micro-batches and data ranks."""
    counts = torch.stack([batch.counts() for batch in micro_batches]).sum(0).to(engine.device)
    dist.all_reduce(counts, group=engine.topology.group("data"))
    return counts


def train_step(engine: Engine, micro_batches: list[PackedBatch], learning_rate: float) -> Losses:
    """Update the weights once; returns the losses of the global batch, on the device."""
    for group in engine.deepspeed.optimizer.param_groups:
        group["lr"] = learning_rate
    counts = global_counts(micro_batches, engine)
    batches = (with_counts(batch.to(engine.device), counts) for batch in micro_batches)
    if isinstance(engine.deepspeed, PipelineEngine):
        engine.deepspeed.train_batch((batch.inputs(), batch.targets()) for batch in batches)
        return Losses(**engine.deepspeed.agg_additional_losses)
    return _plain_step(engine, batches, len(micro_batches))


def _plain_step(engine: Engine, batches: Iterator[PackedBatch], num_micro_batches: int) -> Losses:
    topology = engine.topology
    # The losses are shares of global means already; DeepSpeed averages once more over all of these.
    averaged_over = num_micro_batches * topology.size("data") * topology.size("ulysses")
    shares = []
    for batch in batches:
        losses: Losses = engine.deepspeed(batch)
        engine.deepspeed.backward(losses.total * averaged_over)
        engine.deepspeed.step()
        shares.append(torch.stack(losses).detach())
    totals = torch.stack(shares).sum(0)
    dist.all_reduce(totals, group=topology.group("data"))
    return Losses(*totals.unbind())
