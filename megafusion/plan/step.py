"""Seconds of a step by part, and what bounds it."""

import math
from dataclasses import dataclass
from functools import cached_property

from megafusion.parallel.schedule import bubble
from megafusion.plan.adapters import num_flops
from megafusion.plan.chip import Chip
from megafusion.plan.communication import (
    Traffic,
    data_traffic,
    has_buckets,
    pipeline_traffic,
    tensor_traffic,
    ulysses_traffic,
)
from megafusion.plan.job import Job, token_flops
from megafusion.plan.software import Software

TILE = (128, 256)
"""Rows and columns of a product's tile on Hopper."""


@dataclass(frozen=True)
class Step:
    """Seconds of a step on the slowest pipeline stage, whose sum is the step, and its communication."""

    seconds: dict[str, float]
    bubble: float
    """Share of the micro-batches' time in which a stage waits for others."""
    traffic: tuple[Traffic, ...]
    tokens: int
    flops: float
    """Useful FLOPs: without recomputation and masked pairs."""
    peak: float
    """Of all ranks together."""

    @cached_property
    def total(self) -> float:
        return sum(self.seconds.values())

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.total

    @property
    def mfu(self) -> float:
        return self.flops / (self.total * self.peak)

    @property
    def bound(self) -> str:
        """The part that takes longest, apart from the products, which nobody would avoid; with its share."""
        avoidable = {name: value for name, value in self.seconds.items() if name != "products"}
        name = max(avoidable, key=lambda part: avoidable[part])
        share = avoidable[name] / self.total
        # A step whose products are most of it is bound by them.
        if self.seconds["products"] > 0.7 * self.total or share < 0.05:
            return f"matrix products ({self.seconds['products'] / self.total:.0%})"
        kinds = name.replace("pipeline bubble", "")  # no link makes it
        links = {found.link for found in self.traffic if found.kind.split(",")[0] in kinds}
        over = f" over the {' and the '.join(sorted(links))}" if links else ""
        return f"{name}{over} ({share:.0%})"


def step(job: Job, chip: Chip, software: Software) -> Step:
    """The step of the slowest stage; every stage makes as many micro-batches."""
    stages = [_micro_batch(job, chip, software, stage) for stage in range(len(job.stages))]
    slowest = max(stages, key=lambda parts: sum(parts.values()))
    num, depth = job.micro_batches, len(job.stages)
    seconds = {name: num * value for name, value in slowest.items()}
    idle = bubble(depth, job.parallel.virtual_stages)
    seconds["pipeline bubble"] = idle * sum(slowest.values())
    weights = max(job.num_weights(stage) for stage in range(depth))
    trained = max(job.num_trained(stage) for stage in range(depth))
    every, once = data_traffic(job, chip, software, weights, trained)
    busy = sum(value for name, value in slowest.items() if name != "pipeline transfers")
    hidden = software.sharded_overlap * busy
    seconds["data parallelism"] = num * max(0.0, every.seconds - hidden)
    # Backward of the last micro-batch is two thirds of it.
    seconds["data parallelism"] += max(0.0, once.seconds - software.data_overlap * busy * 2 / 3)
    seconds["optimizer and average"] = _update(job, chip, software, trained)
    seconds["host"] = software.host_seconds
    passes = _passes(job)
    blocks = len(max(job.stages, key=len))
    by_micro_batch = [
        tensor_traffic(job, chip, blocks, passes),
        ulysses_traffic(job, chip, blocks, passes),
        pipeline_traffic(job, chip),
        every,
    ]
    traffic = [
        found._replace(bytes=num * found.bytes, seconds=num * found.seconds) for found in by_micro_batch
    ]
    return Step(
        {name: value for name, value in seconds.items() if value > 0 or name == "products"},
        idle / (num + idle),
        tuple(found for found in [*traffic, once] if found.bytes),
        job.tokens_per_step,
        sum(token_flops(job).values()) * job.tokens_per_step,
        chip.peak_flops * job.world_size * (2 if job.train.precision == "fp8" else 1),
    )


def _passes(job: Job) -> float:
    """Passes over a block's collectives: full recompute repeats all of forward's but the last."""
    return 2.75 if job.train.recompute == "full" else 2.0


def _micro_batch(job: Job, chip: Chip, software: Software, stage: int) -> dict[str, float]:
    """Seconds of a micro-batch's forward and backward on a stage, by part."""
    num = len(job.stages[stage])
    is_first, is_last = stage == 0, stage == len(job.stages) - 1
    recompute = job.train.recompute
    # Forward is a third of products and of other traffic, and two sevenths of attention.
    products = num * _block_products(job, chip, software) * (4 / 3 if recompute == "full" else 1)
    if recompute == "selective" and software.selective == "alternate":
        products *= 7 / 6
    attention = num * _attention(job, chip, software)
    saves_attention = recompute == "none" or (recompute == "selective" and software.selective == "alternate")
    attention *= 1 if saves_attention else 9 / 7
    traffic = num * _elementwise(job, software) * (1 if recompute == "none" else 4 / 3)
    parts = {
        "products": products,
        "attention": attention,
        "elementwise": traffic / chip.memory_bandwidth,
        "gradient sums": _gradient_bytes(job, software) * job.num_trained(stage) / chip.memory_bandwidth,
        "head and loss": _head(job, chip, software) if is_last else 0.0,
    }
    flops = job.down_passes * num_flops(job.adapter.down) * is_first + num_flops(job.adapter.up) * is_last
    # Convolutions reach about half the rate of large products.
    rate = _rate(job, chip, software) * (0.5 if job.model.adapter == "unet" else 1)
    parts["adapters"] = 3 * job.local_slots * flops / rate
    tensor = tensor_traffic(job, chip, num, _passes(job)).seconds
    parts["tensor parallelism"] = max(0.0, tensor - software.tensor_overlap * products)
    parts["ulysses"] = ulysses_traffic(job, chip, num, _passes(job)).seconds
    parts["pipeline transfers"] = pipeline_traffic(job, chip).seconds
    return parts


def _rate(job: Job, chip: Chip, software: Software) -> float:
    if job.bytes_per_number == 4:
        return chip.fp32_flops
    return chip.product_flops * software.product_rate * (1.5 if job.train.precision == "fp8" else 1)


def _product(rows: float, columns: float, depth: float, rate: float, chip: Chip, number: int) -> float:
    """Seconds of a product: whole waves of tiles over the multiprocessors, or its bytes."""
    tiles = math.ceil(rows / TILE[0]) * math.ceil(columns / TILE[1])
    waves = tiles / chip.multiprocessors
    # The last wave is not full; beyond a few waves the tiles' order evens that out.
    quantized = math.ceil(waves) / waves if waves < 4 else 1 + 0.5 / waves
    size = number * (rows * columns + rows * depth + columns * depth)
    return max(2 * rows * columns * depth / rate * quantized, size / chip.memory_bandwidth)


def _block_products(job: Job, chip: Chip, software: Software) -> float:
    """Forward, the input's gradient and the weight's, of a block's four products."""
    model, ranks, rate = job.model, job.parallel.tensor, _rate(job, chip, software)
    rows, stream = job.tokens, model.hidden_size
    queries, kv = model.num_heads * model.head_size / ranks, model.kv_heads * model.head_size / ranks
    hidden = model.ffn_size / ranks
    shapes = [(queries + 2 * kv, stream), (stream, queries), (2 * hidden, stream), (stream, hidden)]
    number = job.bytes_per_number
    return sum(
        _product(rows, columns, depth, rate, chip, number)
        + _product(rows, depth, columns, rate, chip, number)
        + (_product(columns, depth, rows, rate, chip, number) if job.trains_matrices else 0)
        for columns, depth in shapes
    )


def _attention(job: Job, chip: Chip, software: Software) -> float:
    """Forward and backward of a block's attention, of all positions of this rank's heads."""
    model = job.model
    heads = model.num_heads / (job.parallel.tensor * job.parallel.ulysses)
    rows = job.train.micro_batch_size * job.sequence_length
    if software.attention_is_dense:
        keys, rate = float(job.sequence_length), chip.sdpa_flops
    else:
        keys = job.statistics.visible_keys
        # Short documents: edges of tiles are computed and masked.
        rate = chip.attention_flops * software.attention_rate * keys / (keys + 300)
        rate *= min(1.0, 0.5 + model.head_size / 256)
    return 12 * rows * heads * model.head_size * keys / rate


def _elementwise(job: Job, software: Software) -> float:
    """Bytes of norms, residual additions, rope and SwiGLU of a block, forward and backward."""
    model, ranks, number = job.model, job.parallel.tensor, job.bytes_per_number
    stream = job.tokens * model.hidden_size * number
    local = stream / ranks if job.parallel.sequence else stream
    rotated = job.tokens * (model.num_heads + model.kv_heads) * model.head_size * number / ranks
    hidden = job.tokens * model.ffn_size * number / ranks
    traffic = 14 * local + software.rope_traffic * rotated + 6 * stream / ranks
    traffic += (12 if software.is_compiled else 18 if software.saves_silu else 16) * hidden
    traffic += 0 if software.is_compiled else 12 * local
    # collectives.py copies a gathered row of positions: x.chunk and cat.
    return traffic + (16 * stream if job.parallel.sequence and job.train.micro_batch_size > 1 else 0)


def _head(job: Job, chip: Chip, software: Software) -> float:
    """The head's three products, and the cross-entropy."""
    columns, depth = job.model.vocab_size / job.parallel.tensor, job.model.hidden_size
    tokens, rate = job.tokens, _rate(job, chip, software)
    if not software.logits_are_whole:
        tokens *= job.statistics.targets
    elif job.bytes_per_number == 2 and columns % 8:
        rate /= 2  # rows of logits that are not aligned leave cuBLAS's fast kernels
    number = job.bytes_per_number
    products = _product(tokens, columns, depth, rate, chip, number)
    products += _product(tokens, depth, columns, rate, chip, number)
    products += _product(columns, depth, tokens, rate, chip, number)
    return products + software.logit_traffic * tokens * columns / chip.memory_bandwidth


def _gradient_bytes(job: Job, software: Software) -> float:
    """Read and written for the gradient of each trained number in a micro-batch, until it is summed."""
    number, zero, replicas = job.bytes_per_number, job.parallel.zero_stage, job.replicas
    if has_buckets(job, software):
        # ZeRO 2 copies each to a bucket, and adds this rank's share of the reduced ones to its sums.
        return number + (4 + 12 / replicas if zero == 2 and replicas > 1 else 8)
    if number == 4:
        return 12.0
    return 18.0 if zero < 2 else 16.0


def _update(job: Job, chip: Chip, software: Software, weights: int) -> float:
    """Norm, clipping, AdamW, casts and average; at ZeRO 0, and in DeepSpeed's 1, partly over all weights."""
    zero, share, number = job.parallel.zero_stage, weights / job.replicas, job.bytes_per_number
    if job.parallel.offload_optimizer:
        return 24 * share / 100e9 + (4 + number) * share / chip.host_bandwidth
    if zero == 0:
        return 60 * weights / chip.memory_bandwidth
    if software.updates_in_one_pass:
        # The norm reads gradients; the kernel reads those, weights, moments and average, and writes all but
        # gradients, and the model's weights. ZeRO 3 flattens gradients before and casts after.
        moved = 4.0 + 36 + number
        moved += 12 if zero == 3 else 8 * (job.replicas > 1)  # the mean over data ranks
        return moved * share / chip.memory_bandwidth
    moved = 24 * weights + 46 * share if zero == 1 else 70 * share
    return moved / chip.memory_bandwidth
