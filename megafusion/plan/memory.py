"""Bytes on a rank by part, at the peak of a step."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megafusion.objective.config import LOGITS_ALIGNMENT, positions_in_chunk
from megafusion.parallel.schedule import in_flight
from megafusion.plan.activations import backward_of_block, saved_by_block, saved_by_tail, saved_once
from megafusion.plan.adapters import num_features
from megafusion.plan.communication import num_sent
from megafusion.plan.job import Job
from megafusion.plan.software import BUCKET_SIZE, SMALL_SHARE, Software

CONTEXT_BYTES = 2.0 * 2**30
"""CUDA's context, NCCL's buffers and libraries' work space: an estimate, 1.5 to 2.5 GiB."""
FRAGMENTATION = 0.04
"""Of what a step allocates: an estimate, 3 to 5%."""
MAX_LIVE_NUMBERS = 1e9
"""Weights that DeepSpeed's ZeRO 3 keeps gathered (stage3_max_live_parameters)."""
BUCKETS = 6
"""Buckets with memory at ZeRO 2: those that backward fills and those in flight (engine/buckets.py)."""


@dataclass(frozen=True)
class Memory:
    """Bytes on a rank of the pipeline stage that needs most."""

    stage: int
    weights: float
    gradients: float
    optimizer: float
    """Master weights and both moments."""
    average: float
    activations: float
    """Saved by blocks and tail, and sent or received, of all micro-batches in flight."""
    backward: float
    """One block's backward pass, beyond what the loss needs before it."""
    adapters: float
    """Saved by the adapters."""
    logits: float
    """At the loss's peak, with the gradient of the head's weight, which float32 sums over chunks hold."""
    buffers: float
    """Reduce buckets, and weights gathered by ZeRO 3."""
    context: float
    fragmentation: float

    def parts(self) -> dict[str, float]:
        return {name: value for name, value in vars(self).items() if name != "stage"}

    @property
    def total(self) -> float:
        return sum(self.parts().values())

    @property
    def state(self) -> float:
        """Bytes that stay between steps."""
        return self.weights + self.gradients + self.optimizer + self.average


def memory(job: Job, software: Software) -> Memory:
    """The largest of all stages."""
    stages = (stage_memory(job, software, stage) for stage in range(len(job.stages)))
    return max(stages, key=lambda found: found.total)


def stage_memory(job: Job, software: Software, stage: int) -> Memory:
    """Bytes on a rank of one stage."""
    parallel, number = job.parallel, job.bytes_per_number
    is_first, is_last = stage == 0, stage == len(job.stages) - 1
    tensors = list(job.tensors(stage).values())
    state = state_bytes(job, software, tensors, job.num_trained(stage))
    each = number * job.local_slots
    down = each * job.down_passes * num_features(job.adapter.down) * is_first
    up = each * num_features(job.adapter.up) * is_last
    by_blocks = [_saved_by(job, software, blocks) for blocks in job.virtual_stages[stage]]
    by_all = [*by_blocks[:-1], by_blocks[-1] + up]
    by_all[0] += down
    sizes = len(job.stages), parallel.virtual_stages, job.micro_batches
    sent = number * num_sent(job)
    held, transfers = max(
        in_flight(stage, *sizes), key=lambda found: _weighted(found.passes, by_all) + found.transfers * sent
    )
    saved = _weighted(held, by_blocks) + number * saved_by_tail(job, software) * is_last
    saved += transfers * sent
    adapters = held[0] * down + held[-1] * up
    logits = _loss_peak(job, software) if is_last else 0.0
    # Backward of a block comes after that of the loss.
    backward = max(0.0, number * job.tokens * backward_of_block(job, software) - logits)
    buffers = _buffers(job, software, tensors)
    dynamic = saved + backward + adapters + logits + buffers
    fragmentation = FRAGMENTATION * dynamic
    return Memory(stage, *state, saved, backward, adapters, logits, buffers, CONTEXT_BYTES, fragmentation)


def _saved_by(job: Job, software: Software, blocks: range) -> float:
    """Bytes that a micro-batch's pass through a virtual stage's blocks keeps until its backward pass."""
    numbers = job.tokens * len(blocks) * saved_by_block(job, software)
    sent = num_sent(job)
    if blocks.stop < job.model.num_layers:
        numbers += sent
    if blocks.start > 0:
        # The first block saves the residual stream that was received. DeepSpeed's engine keeps a copy of all.
        numbers += job.local_slots * job.adapter.skips + (sent if job.parallel.virtual_stages == 1 else 0)
    return job.bytes_per_number * numbers + saved_once(job, software)


def _weighted(counts: Sequence[int], sizes: Sequence[float]) -> float:
    return sum(count * size for count, size in zip(counts, sizes, strict=True))


def _loss_peak(job: Job, software: Software) -> float:
    """Logits that are there at once, what is made of them, and two buffers of DeepSpeed's pipeline."""
    columns, number = job.model.vocab_size / job.parallel.tensor, job.bytes_per_number
    has_pipeline = len(job.stages) > 1 and job.parallel.virtual_stages == 1
    if software.logits_are_whole:
        each = software.logit_bytes + (4 if job.parallel.tensor > 1 else 0)  # one float32 copy more
        return job.tokens * (each + 2 * number * has_pipeline) * columns
    stream = job.model.hidden_size
    padded = math.ceil(columns / LOGITS_ALIGNMENT) * LOGITS_ALIGNMENT
    positions = min(positions_in_chunk(padded, number), job.tokens * job.statistics.targets)
    # A chunk's logits; the weight's gradient, a chunk's part of it, and the weight with aligned columns.
    weight_bytes = 4 + number + number * (padded != columns)
    outputs = 2 * number * job.tokens * job.parallel.ulysses * stream * has_pipeline
    return software.logit_bytes * positions * padded + weight_bytes * padded * stream + outputs


def state_bytes(
    job: Job, software: Software, tensors: list[int], trained: int
) -> tuple[float, float, float, float]:
    """Weights, gradients, optimizer and average; see docs/parallelism.md."""
    parallel, zero = job.parallel, job.parallel.zero_stage
    total = sum(tensors)
    number, replicas = job.bytes_per_number, job.replicas
    share = trained / replicas if zero else trained
    weights = float(number * total)
    if zero == 3:
        # Tensors of at most hidden_size numbers stay whole on every rank (param_persistence_threshold).
        whole = sum(size for size in tensors if size <= job.model.hidden_size)
        weights = number * ((total - whole) / replicas + whole) if software.keeps_weight_copy else 0.0
    # Accumulated in float32; ZeRO 0 and 1 keep the whole sums, 2 and 3 this rank's.
    gradients = 4.0 * (trained if zero < 2 else share)
    optimizer, average = (8.0 if zero == 0 else 12.0) * share, 4.0 * share
    if parallel.offload_optimizer:
        gradients, optimizer, average = gradients if zero < 2 else 0.0, 0.0, 0.0
    return weights, gradients, optimizer, average if software.keeps_average else 0.0


def _buffers(job: Job, software: Software, tensors: list[int]) -> float:
    """Reduce buckets that are live in backward, and what ZeRO 3 gathers."""
    zero, number = job.parallel.zero_stage, job.bytes_per_number
    if job.parallel.offload_optimizer and zero < 3:
        return number * software.bucket_numbers
    if zero < 3:
        own, total = 0.0, sum(tensors)
        if zero == 2 and job.replicas > 1:
            # A group of small shares is one bucket.
            own = 4.0 * (total if total < job.replicas * SMALL_SHARE else min(BUCKETS * BUCKET_SIZE, total))
        return (number + 4.0) * max(tensors) + own  # a gradient before it is added to the sums
    gathered = number * min(sum(tensors), MAX_LIVE_NUMBERS)
    return 4.0 * software.bucket_numbers + gathered
