"""The plan of a whole run: the layouts that are best, the one that is configured, days and cost."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from megafusion.errors import UserError
from megafusion.plan.chip import Chip
from megafusion.plan.goodput import FAILURES_PER_GPU_HOUR, RESTART_SECONDS, Goodput, goodput
from megafusion.plan.job import Job, token_flops, whole_weights
from megafusion.plan.search import Plan, check_job, distinct, plan_job, search, what_would_fit

NUM_NEXT = 2
"""Layouts that are named beside the best."""


class Run(NamedTuple):
    """A plan over the length of a run."""

    plan: Plan
    goodput: Goodput
    days: float
    """With failures, saves and restarts."""
    gpu_hours: float
    dollars: float

    def describe(self) -> dict[str, Any]:
        """Plain values, in bytes, seconds and numbers a second."""
        plan, job, step = self.plan, self.plan.job, self.plan.step
        return {
            "fits": plan.fits,
            "spare_bytes": plan.spare,
            "overrides": plan.overrides(),
            "data_ranks": job.data,
            "micro_batches": job.micro_batches,
            "stages": [[[blocks.start, blocks.stop] for blocks in stage] for stage in job.virtual_stages],
            "memory_bytes": plan.memory.parts() | {"total": plan.memory.total, "stage": plan.memory.stage},
            "step_seconds": step.seconds | {"total": step.total},
            "bubble": step.bubble,
            "bound": step.bound,
            "communication": [found._asdict() for found in step.traffic],
            "tokens_per_second": step.tokens_per_second,
            "tokens_per_second_per_gpu": step.tokens_per_second / job.world_size,
            "mfu": step.mfu,
            "days": self.days,
            "gpu_hours": self.gpu_hours,
            "dollars": self.dollars,
            "goodput": self.goodput._asdict(),
        }


@dataclass
class RunPlan:
    """The result of `megafusion plan`."""

    job: Job
    """As it is configured."""
    chip: Chip
    runs: list[Run]
    """The best, and the next; without one that fits, the one that needs least memory."""
    configured: Run | str
    """The layout as it is configured, or why its degrees are not possible."""
    reason: str
    """Why the first is the best, or what would fit."""

    @property
    def best(self) -> Run:
        return self.runs[0]

    def describe(self) -> dict[str, Any]:
        """Plain values."""
        configured = self.configured if isinstance(self.configured, str) else self.configured.describe()
        return {
            "is": "a prediction; nothing has been measured on a GPU",
            "gpus": self.job.world_size,
            "chip": vars(self.chip) | {"sources": self.chip.sources},
            "parameters": whole_weights(self.job.model),
            "flops_per_token": token_flops(self.job),
            "reason": self.reason,
            "recommended": self.best.describe(),
            "next": [run.describe() for run in self.runs[1:]],
            "configured": configured,
        }


def plan_run(
    job: Job,
    chip: Chip,
    *,
    num_steps: int,
    gpu_hour: float | None = None,
    failures: float = FAILURES_PER_GPU_HOUR,
    restart: float = RESTART_SECONDS,
) -> RunPlan:
    """Search the layouts. failures: of a GPU in an hour. Raises UserError where no degrees are possible."""

    def over_the_run(plan: Plan) -> Run:
        state = 16.0 * max(plan.job.num_trained(stage) for stage in range(len(plan.job.stages)))
        kept = goodput(
            job.world_size,
            plan.step.total,
            # At ZeRO 0 every rank copies all of it to its host.
            state / (plan.job.replicas if plan.job.parallel.zero_stage else 1),
            failures=failures,
            restart=restart,
        )
        hours = num_steps * plan.step.total / max(kept.share, 1e-9) / 3600
        cost = hours * job.world_size * (chip.gpu_hour if gpu_hour is None else gpu_hour)
        return Run(plan, kept, hours / 24, hours * job.world_size, cost)

    plans = search(job, chip)
    if plans[0].fits:
        best = distinct([plan for plan in plans if plan.fits], 1 + NUM_NEXT)
        reason = _reason(best)
    else:
        best = [min(plans, key=lambda plan: plan.memory.total)]
        reason = what_would_fit(best[0], chip)
    configured: Run | str
    try:
        check_job(job)
        configured = over_the_run(plan_job(job, chip))
    except UserError as error:
        configured = f"not possible on {job.world_size} GPUs: {error}"
    return RunPlan(job, chip, list(map(over_the_run, best)), configured, reason)


def _reason(best: list[Plan]) -> str:
    text = f"bound by {best[0].step.bound}"
    if len(best) > 1:
        gain = best[0].step.tokens_per_second / best[1].step.tokens_per_second - 1
        text += f"; {gain:.1%} faster than the next, which is bound by {best[1].step.bound}"
    return text
