"""Layouts of a run's ranks: which are possible, which fit, which is fastest, and what would fit."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

from megafusion.errors import UserError
from megafusion.parallel.config import ParallelConfig, Recompute
from megafusion.parallel.degrees import check_degrees
from megafusion.plan.chip import Chip, chip_names, load_chip
from megafusion.plan.job import Job
from megafusion.plan.memory import Memory, memory
from megafusion.plan.software import Software, of_run
from megafusion.plan.step import Step, step

MICRO_BATCHES = (1, 2, 4, 8, 16)
RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full")
VIRTUAL_STAGES = (1, 2, 4)
ZERO_STAGES: tuple[Literal[1, 2, 3], ...] = (1, 2, 3)


@dataclass(frozen=True)
class Plan:
    """A layout with its memory and its step."""

    job: Job
    software: Software
    memory: Memory
    step: Step
    spare: float
    """Bytes of the GPU's memory that are left; negative where it does not fit."""

    @property
    def fits(self) -> bool:
        return self.spare >= 0

    def overrides(self) -> list[str]:
        """Keys of a run's configuration that make this layout."""
        job = self.job
        keys = {f"parallel.{name}": value for name, value in job.parallel.model_dump().items()}
        keys |= {
            "train.micro_batch_size": job.train.micro_batch_size,
            "train.recompute": job.train.recompute,
            "train.precision": job.train.precision,
            "train.compile": job.train.compile,
            "model.attention": job.model.attention,
        }
        return [f"{key}={str(value).lower()}" for key, value in keys.items()]


def plan_job(job: Job, chip: Chip, software: Software | None = None) -> Plan:
    """The plan of one layout."""
    software = software or of_run(job.train, job.model.attention)
    held = memory(job, software)
    return Plan(job, software, held, step(job, chip, software), chip.memory_bytes - held.total)


def check_job(job: Job) -> None:
    """Raise UserError if the degrees do not divide what they shard, or a pipeline does not serve the run."""
    check_degrees(
        job.model,
        job.parallel,
        sequence_length=job.sequence_length,
        global_batch_size=job.train.global_batch_size,
        micro_batch_size=job.train.micro_batch_size,
        world_size=job.world_size,
    )
    if (depth := job.parallel.pipeline) == 1:
        return
    if job.has_alignment:
        raise UserError(f"objective.alignment is not supported with parallel.pipeline {depth}; set it to 1")
    partial = job.train.freeze or job.train.lora
    if partial and not all(job.num_trained(stage) for stage in range(len(job.stages))):
        raise UserError(f"a stage of parallel.pipeline {depth} has nothing to train; use fewer stages")


def layouts(
    job: Job,
    chip: Chip,
    micro_batches: Sequence[int] = MICRO_BATCHES,
    recompute: Sequence[Recompute] = RECOMPUTE,
) -> Iterator[Job]:
    """Every layout of the same run that its degrees allow, in bf16, compiled, with attention of intervals."""
    precision = "bf16" if job.train.precision == "fp32" else job.train.precision
    model = job.model
    if model.attention == "sdpa":
        model = model.model_copy(update={"attention": "auto"})
    trains = [
        job.train.model_copy(
            update={"precision": precision, "compile": True, "micro_batch_size": size, "recompute": kind}
        )
        for size, kind in product(micro_batches, recompute)
    ]
    for pipeline, tensor, ulysses, zero, virtual in product(
        (1, 2, 4, 8, 16), (1, 2, 4, 8), sorted({1, job.parallel.ulysses}), ZERO_STAGES, VIRTUAL_STAGES
    ):
        others = pipeline * tensor * ulysses
        if job.world_size % others or (pipeline > 1 and zero > 1) or tensor * ulysses > chip.node_gpus:
            continue
        if pipeline == 1 < virtual:
            continue
        parallel = ParallelConfig(
            pipeline=pipeline,
            virtual_stages=virtual,
            tensor=tensor,
            sequence=tensor > 1,
            ulysses=ulysses,
            zero_stage=zero,
        )
        for each in trains:
            candidate = replace(job, model=model, train=each, parallel=parallel)
            try:
                check_job(candidate)
            except UserError:
                continue
            yield candidate


def search(job: Job, chip: Chip) -> list[Plan]:
    """The plans of all layouts: those that fit first, each kind by its tokens a second."""
    plans = [plan_job(candidate, chip) for candidate in layouts(job, chip)]
    if not plans:
        raise UserError(f"--gpus {job.world_size}: {_no_layout(job, chip)}")
    return sorted(plans, key=lambda plan: (not plan.fits, -plan.step.tokens_per_second))


def distinct(plans: list[Plan], number: int) -> list[Plan]:
    """The first plans that differ in a degree, recompute or ZeRO, and not in the micro-batch alone."""
    chosen: dict[tuple, Plan] = {}
    for plan in plans:
        chosen.setdefault((plan.job.parallel, plan.job.train.recompute), plan)
    return list(chosen.values())[:number]


def _no_layout(job: Job, chip: Chip) -> str:
    """Why no degrees divide a number of GPUs, and the nearest that they divide."""
    batch, near = job.train.global_batch_size, []
    for distance in range(1, job.world_size + 1):
        for number in (job.world_size - distance, job.world_size + distance):
            if number and next(layouts(replace(job, world_size=number), chip, (1,), ("full",)), None):
                near.append(number)
        if len(near) >= 2:
            break
    return (
        f"no degrees divide it: the data-parallel ranks must divide train.global_batch_size {batch}, and "
        f"tensor ranks the {job.model.num_heads} heads; the nearest numbers that work are "
        f"{' and '.join(map(str, sorted(near)[:2]))}, or change train.global_batch_size"
    )


def what_would_fit(smallest: Plan, chip: Chip) -> str:
    """By how much the plan that needs least memory does not fit, and what would."""
    job, missing = smallest.job, -smallest.spare / 2**30
    text = f"nothing fits: the smallest layout is {missing:.1f} GiB over the {chip.memory_gib:.1f} of a GPU"
    larger = []
    for factor in (2, 4, 8, 16, 32, 64, 128):
        more = replace(job, world_size=job.world_size * factor)
        try:
            small = layouts(more, chip, (1,), ("full",))
            found = min(memory(each, of_run(each.train, each.model.attention)).total for each in small)
        except ValueError:  # no layout
            continue
        if found <= chip.memory_bytes:
            larger.append(f"--gpus {more.world_size}")
            break
    for name in chip_names():
        other = load_chip(name)
        if other.memory_bytes > chip.memory_bytes and smallest.memory.total <= other.memory_bytes:
            larger.append(f"--gpu {name}")
    parts = smallest.memory.parts()
    most = max(parts, key=lambda part: parts[part])
    way_out = f"{' or '.join(larger)} would" if larger else "make the model or its rows smaller"
    return f"{text} (most of it {most}, {parts[most] / 2**30:.1f} GiB); {way_out}"
