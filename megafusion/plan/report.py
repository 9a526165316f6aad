"""A plan as tables."""

from rich.console import Console
from rich.table import Table

from megafusion.plan.job import token_flops, whole_weights
from megafusion.plan.runs import Run, RunPlan
from megafusion.plan.search import Plan

GIB = 2**30
PREDICTION = "A prediction by arithmetic: nothing here has been measured on a GPU."


def show(found: RunPlan, console: Console) -> None:
    """Print the recommended layout in full, and the others a line each."""
    best, chip, configured = found.best, found.chip, found.configured
    console.print(f"[bold]{found.job.world_size} x {chip.about}[/]. {PREDICTION}")
    console.print(_model_table(best))
    console.print(_parts("GiB a rank", best.plan.memory.parts(), GIB, chip.memory_gib))
    console.print(_parts("seconds a step", best.plan.step.seconds, 1.0, None))
    console.print(_traffic_table(best))
    console.print(_length_table(best))
    table = Table("", "ranks", "ZeRO", "rows", "recompute", "GiB", "s a step", "tokens/s", "MFU", "bound by")
    names = ["recommended" if best.plan.fits else "needs least", "next", "third"]
    lines = list(zip(names, found.runs, strict=False))
    if isinstance(configured, Run):
        lines.append(("as configured", configured))
    for name, run in lines:
        table.add_row(name, *_cells(run.plan))
    console.print(table)
    if isinstance(configured, str):
        console.print(f"as configured: {configured}", highlight=False)
    console.print(found.reason, highlight=False)
    console.print(" ".join(best.plan.overrides()), soft_wrap=True, highlight=False)


def one_line(plan: Plan) -> str:
    """A layout, and what is predicted of it."""
    step = plan.step
    return (
        f"{layout_name(plan)}: {plan.memory.total / GIB:.1f} GiB a rank, {_number(step.total)} s a step, "
        f"{step.tokens_per_second:,.0f} tokens/s, MFU {step.mfu:.1%}, bound by {step.bound} (a prediction)"
    )


def layout_name(plan: Plan) -> str:
    """The degrees of a layout in short."""
    job = plan.job
    return (
        f"{_ranks(plan)}, ZeRO {job.parallel.zero_stage}, {job.micro_batches} x {job.train.micro_batch_size} "
        f"rows, recompute {job.train.recompute}"
    )


def _ranks(plan: Plan) -> str:
    parallel = plan.job.parallel
    degrees = {"data": plan.job.data} | {
        name: getattr(parallel, name) for name in ("pipeline", "tensor", "ulysses")
    }
    ranks = " x ".join(f"{name} {size}" for name, size in degrees.items() if size > 1) or "one"
    return ranks + (f", virtual stages {parallel.virtual_stages}" if parallel.virtual_stages > 1 else "")


def _cells(plan: Plan) -> list[str]:
    job, step = plan.job, plan.step
    over = "" if plan.fits else f" ({-plan.spare / GIB:.1f} over)"
    eager = "" if job.train.compile else f" ({job.train.precision}, {job.model.attention}, eager)"
    return [
        _ranks(plan) + eager,
        str(job.parallel.zero_stage),
        f"{job.micro_batches} x {job.train.micro_batch_size}",
        job.train.recompute,
        f"{plan.memory.total / GIB:.1f}{over}",
        _number(step.total),
        f"{step.tokens_per_second:,.0f}",
        f"{step.mfu:.1%}",
        step.bound,
    ]


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def _model_table(run: Run) -> Table:
    job = run.plan.job
    weights, flops = whole_weights(job.model), token_flops(job)
    table = Table("", *flops, "all", title=f"{sum(weights.values()) / 1e9:.3g}B parameters")
    counts = weights | {"attention": 0, "head": weights["head"] + weights["embedding"]}
    millions = [f"{counts[part] / 1e6:,.1f}" for part in flops]
    table.add_row("million parameters", *millions, f"{sum(weights.values()) / 1e6:,.1f}")
    giga = [f"{value / 1e9:.3g}" for value in flops.values()]
    table.add_row("GFLOP a token, forward and backward", *giga, f"{sum(flops.values()) / 1e9:.3g}")
    return table


def _parts(title: str, parts: dict[str, float], unit: float, limit: float | None) -> Table:
    table = Table("", title, "share")
    total = sum(parts.values())
    for name, value in sorted(parts.items(), key=lambda part: -part[1]):
        if value / total >= 0.001:
            table.add_row(name, _number(value / unit), f"{value / total:.1%}")
    table.add_row("all", _number(total / unit) + (f" of {limit:.1f}" if limit else ""), "", style="bold")
    return table


def _traffic_table(run: Run) -> Table:
    table = Table("communication of a rank, a step", "GB", "link", "seconds if nothing hides it")
    for found in run.plan.step.traffic:
        table.add_row(found.kind, f"{found.bytes / 1e9:.3g}", found.link, f"{found.seconds:.3g}")
    return table


def _length_table(run: Run) -> Table:
    goodput, table = run.goodput, Table("the whole run", "")
    minutes = goodput.every * run.plan.step.total / 60
    rows = {
        "days, GPU-hours, dollars": f"{run.days:,.1f}, {run.gpu_hours:,.0f}, {run.dollars:,.0f}",
        "dollars of a GPU-hour": f"{run.dollars / run.gpu_hours:.2f}" if run.gpu_hours else "",
        "pipeline bubble": f"{run.plan.step.bubble:.1%}",
        "a failure every": f"{goodput.failure_seconds / 3600:,.0f} hours",
        "save, restart": f"{goodput.stall:.2g} s, {goodput.restart:.0f} s",
        "best checkpoint.every": f"{goodput.every} steps ({_number(minutes)} minutes)",
        "share of time that trains": f"{goodput.share:.1%}",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table
