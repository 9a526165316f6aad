"""Bytes that a rank sends by kind, and the seconds that they take on the links between its ranks."""

import math
from typing import NamedTuple

from megafusion.plan.chip import Chip
from megafusion.plan.job import Job
from megafusion.plan.software import BUCKET_SIZE, SMALL_SHARE, Software

NUM_GROUPS = 2
"""Of parameters that are flattened together: matrices and vectors (engine/optimizer.py)."""


class Traffic(NamedTuple):
    """A kind of communication in one step, on the busiest rank."""

    kind: str
    bytes: float
    """Sent by a rank."""
    link: str
    """node: NVLink; network: the cards between nodes."""
    seconds: float
    """If nothing hides it."""


def tensor_traffic(job: Job, chip: Chip, num_blocks: int, passes: float) -> Traffic:
    """Of one micro-batch on a stage: an all-reduce at the end of each region, or its two halves.

    passes: 2 for forward and backward, more where forward is computed again.
    """
    ranks = job.parallel.tensor
    size = job.tokens * job.model.hidden_size * job.bytes_per_number
    num = 2 * num_blocks * passes + 2
    sent = num * size * 2 * (ranks - 1) / ranks
    return _on_links(job, chip, "tensor", sent, ranks, 1, 2 * num)


def ulysses_traffic(job: Job, chip: Chip, num_blocks: int, passes: float) -> Traffic:
    """All-to-alls around the attention of a stage's blocks, of one micro-batch."""
    model, ranks = job.model, job.parallel.ulysses
    numbers = 2 * (model.num_heads + model.kv_heads) * model.head_size / job.parallel.tensor
    sent = num_blocks * passes * job.tokens * numbers * job.bytes_per_number * (ranks - 1) / ranks
    return _on_links(job, chip, "ulysses", sent, ranks, job.parallel.tensor, 4 * num_blocks * passes)


def pipeline_traffic(job: Job, chip: Chip) -> Traffic:
    """Bytes of `num_sent` to the next virtual stage and of its gradient back, of one micro-batch."""
    parallel = job.parallel
    if parallel.pipeline == 1:
        return Traffic("pipeline", 0, "node", 0)
    num = 2 * parallel.virtual_stages
    sent = num * num_sent(job) * job.bytes_per_number
    is_near = job.world_size <= chip.node_gpus
    seconds = sent / (chip.node_bandwidth if is_near else chip.card_bandwidth) + num * chip.latency
    return Traffic("pipeline", sent, "node" if is_near else "network", seconds)


def num_sent(job: Job) -> float:
    """Numbers that a virtual stage sends of a micro-batch: the residual stream and the adapter's skips."""
    ranks = job.parallel.tensor if job.parallel.sequence else 1
    return job.tokens * job.model.hidden_size / ranks + job.local_slots * job.adapter.skips


def has_buckets(job: Job, software: Software) -> bool:
    """Whether gradients are reduced by engine/buckets.py."""
    parallel = job.parallel
    return software.updates_in_one_pass and parallel.zero_stage in (1, 2) and not parallel.offload_optimizer


def num_reductions(trained: int, ranks: int) -> int:
    """Collectives that reduce the gradients of matrices and of vectors once, as engine/buckets.py does."""
    share = trained / ranks
    vectors = 1  # whose shares are small
    return vectors + (1 if share < SMALL_SHARE else ranks * math.ceil(share / BUCKET_SIZE))


def data_traffic(
    job: Job, chip: Chip, software: Software, weights: int, trained: int
) -> tuple[Traffic, Traffic]:
    """Communication of a rank's weights: that of each micro-batch (ZeRO 2 and 3), and that of each step."""
    zero, ranks = job.parallel.zero_stage, job.replicas
    stride = job.parallel.tensor  # Ulysses ranks are between data ranks, and in their group
    share = (ranks - 1) / ranks
    reduced = software.reduced_bytes * trained * share
    # Updated weights are gathered once a step; with ZeRO 3 all of them, in each pass.
    gathered = job.bytes_per_number * (weights if zero == 3 else trained) * share
    by_stage = {
        0: (0.0, 2 * reduced),
        1: (0.0, (1 if software.shards_gradients_at_step else 2) * reduced + gathered),
        2: (reduced, gathered),
        3: (2 * gathered + reduced, 0.0),
    }
    every, once = by_stage[zero]
    # A collective for each tensor of a block with ZeRO 3, for each bucket else.
    calls = 3 * len(max(job.stages, key=len)) if zero == 3 else math.ceil(weights / software.bucket_numbers)
    calls_every, calls_once = calls, calls
    if has_buckets(job, software):
        calls_every = num_reductions(trained, ranks)
        calls_once = NUM_GROUPS + (calls_every if zero == 1 else 0)
    return (
        _on_links(job, chip, "data, a micro-batch", every, ranks, stride, calls_every),
        _on_links(job, chip, "data, a step", once, ranks, stride, calls_once),
    )


def _on_links(job: Job, chip: Chip, kind: str, sent: float, ranks: int, stride: int, calls: float) -> Traffic:
    """Ranks of a group are `stride` apart. A ring leaves a node by the cards of the group's ranks there."""
    if ranks == 1 or sent == 0:
        return Traffic(kind, 0, "node", 0)
    in_node = max(1, min(ranks, chip.node_gpus // stride))
    if ranks <= in_node:
        return Traffic(kind, sent, "node", sent / chip.node_bandwidth + calls * chip.latency / 3)
    bandwidth = min(chip.node_bandwidth, in_node * chip.card_bandwidth)
    nodes = ranks / in_node
    return Traffic(
        kind, sent, "network", sent / bandwidth + calls * chip.latency * (1 + math.log2(max(2, nodes)) / 4)
    )
