"""Tables and images of docs/scaling.md: python docs/scaling.py; the tables go to standard output."""

from dataclasses import replace
from pathlib import Path

import matplotlib

from megafusion.config import load_config
from megafusion.plan.chip import load_chip
from megafusion.plan.report import layout_name
from megafusion.plan.runs import RunPlan, plan_run
from megafusion.train.config import RunConfig

HERE = Path(__file__).parent
GPUS = (8, 64, 256, 1024)
ROWS_PER_GPU = 4
"""Of the weak series."""


def plans(weak: bool) -> list[RunPlan]:
    """7B on each number of H100s: with the paper's batch of 512 rows, or with as many rows a GPU."""
    config = load_config(RunConfig, HERE.parent / "configs/7b.yaml")
    found = []
    for number in GPUS:
        job = config.job(number)
        batch = ROWS_PER_GPU * number if weak else job.train.global_batch_size
        job = replace(job, train=job.train.model_copy(update={"global_batch_size": batch}))
        found.append(plan_run(job, load_chip("h100"), num_steps=config.train.num_steps))
    return found


def table(found: list[RunPlan]) -> str:
    lines = ["| GPUs | rows a step | layout | GiB | s a step | tokens/s | a GPU | MFU | bound by |"]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for each in found:
        plan = each.best.plan
        step, number = plan.step, each.job.world_size
        lines.append(
            f"| {number:,} | {each.job.train.global_batch_size:,} | {layout_name(plan)} | "
            f"{plan.memory.total / 2**30:.1f} | {step.total:.3g} | {step.tokens_per_second:,.0f} | "
            f"{step.tokens_per_second / number:,.0f} | {step.mfu:.0%} | {step.bound} |"
        )
    return "\n".join(lines)


def run_table(found: list[RunPlan]) -> str:
    """Days, cost and goodput of the strong series."""
    head = "| GPUs | days | GPU-hours | dollars | a failure every | checkpoint.every | trains |"
    lines = [head, "|---|---|---|---|---|---|---|"]
    for each in found:
        best, goodput = each.best, each.best.goodput
        lines.append(
            f"| {each.job.world_size:,} | {best.days:,.1f} | {best.gpu_hours:,.0f} | {best.dollars:,.0f} | "
            f"{goodput.failure_seconds / 3600:,.0f} h | {goodput.every} | {goodput.share:.1%} |"
        )
    return "\n".join(lines)


def draw(strong: list[RunPlan], weak: list[RunPlan]) -> None:
    """Two images: tokens a second against GPUs, and where the time of a strong step goes."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for name, found in (("strong: 512 rows a step", strong), ("weak: 4 rows a GPU", weak)):
        axes.plot(GPUS, [f.best.plan.step.tokens_per_second / 1e6 for f in found], "o-", label=name)
    first = weak[0].best.plan.step.tokens_per_second / GPUS[0]
    axes.plot(GPUS, [first * number / 1e6 for number in GPUS], "--", color="grey", label="linear")
    axes.set(xscale="log", yscale="log", xlabel="H100s", ylabel="million tokens a second (predicted)")
    axes.set_xticks(GPUS, [f"{number:,}" for number in GPUS])
    axes.minorticks_off()
    axes.legend()
    axes.set_title("7B, predicted by `megafusion plan`")
    figure.savefig(HERE / "scaling-speed.png", dpi=110)

    figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    names = list(dict.fromkeys(part for f in strong for part in f.best.plan.step.seconds))
    left = [0.0] * len(strong)
    colours = pyplot.get_cmap("tab20")
    for number, name in enumerate(names):
        shares = [f.best.plan.step.seconds.get(name, 0) / f.best.plan.step.total for f in strong]
        if max(shares) < 0.01:
            continue
        labels = [f"{count:,} GPUs" for count in GPUS]
        axes.barh(labels, shares, left=left, label=name, color=colours(number))
        left = [a + b for a, b in zip(left, shares, strict=True)]
    axes.set(xlabel="share of a step (predicted)", xlim=(0, 1))
    axes.invert_yaxis()
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    axes.set_title("7B, 512 rows a step")
    figure.savefig(HERE / "scaling-parts.png", dpi=110)


if __name__ == "__main__":
    series = plans(weak=False), plans(weak=True)
    print(table(series[0]), run_table(series[0]), table(series[1]), sep="\n\n")
    draw(*series)
