"""One optimizer step: count targets, forward and backward, clip, step."""

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from torch import Tensor

from megafusion.objective.losses import Losses
from megafusion.sequence.packing import PackedBatch, with_counts


def global_counts(micro_batches: list[PackedBatch], device: torch.device) -> Tensor:
    """int64 [2]: text targets and images of the global batch, summed over micro-batches and ranks."""
    counts = torch.stack([batch.counts() for batch in micro_batches]).sum(0).to(device)
    dist.all_reduce(counts)
    return counts


def train_step(engine: DeepSpeedEngine, micro_batches: list[PackedBatch], learning_rate: float) -> Losses:
    """Update the weights once; returns the losses of the global batch, on the device."""
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate
    counts = global_counts(micro_batches, engine.device)
    # The losses are shares of global means already; DeepSpeed averages once more over both of these.
    averaged_over = len(micro_batches) * dist.get_world_size()
    shares = []
    for batch in micro_batches:
        losses: Losses = engine(with_counts(batch.to(engine.device), counts))
        engine.backward(losses.total * averaged_over)
        engine.step()
        shares.append(torch.stack(losses).detach())
    totals = torch.stack(shares).sum(0)
    dist.all_reduce(totals)
    return Losses(*totals.unbind())
