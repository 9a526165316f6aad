"""Plots and words of a sweep's fits."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megafusion.errors import UserError
from megafusion.sweep.fit import Law, Point, fit_arms
from megafusion.sweep.results import FINISHED

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COMPUTE = "flops"


def points_of(results: Mapping[str, Any], metric: str) -> dict[str, list[Point]]:
    """By arm, the finished runs that have the metric. UserError where none has it."""
    arms: dict[str, list[Point]] = {}
    finished = [run for run in results["runs"].values() if run["state"] == FINISHED]
    for run in finished:
        found = run["metrics"]
        if metric in found and COMPUTE in found:
            point = Point(run["group"], found[COMPUTE], found[metric])
            arms.setdefault(run["arm"], []).append(point)
    if not arms:
        names = ", ".join(sorted({name for run in finished for name in run["metrics"]}))
        raise UserError(f"--fit {metric}: no finished run has it; there are {names or 'no metrics yet'}")
    return arms


def fit_metric(results: Mapping[str, Any], metric: str, baseline: str | None, out: Path) -> dict[str, Any]:
    """The fit of a metric of a sweep, whose plot is written to OUT/sweep.METRIC.png. Raises UserError."""
    arms = points_of(results, metric)
    found = fit_arms(arms, next(iter(arms)) if baseline is None else baseline)
    found["plot"] = f"sweep.{metric.replace('/', '-')}.png"
    draw(arms, found, metric, out / found["plot"])
    return found


def draw(arms: Mapping[str, Sequence[Point]], found: Mapping[str, Any], metric: str, path: Path) -> None:
    """Write a plot of runs and laws against compute."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    draw_laws(figure.add_subplot(), arms, found, metric)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def draw_laws(
    axes: "Axes", arms: Mapping[str, Sequence[Point]], found: Mapping[str, Any], metric: str
) -> None:
    """Draw runs and laws against compute, both axes logarithmic where values allow it."""
    axes.set_xscale("log")
    axes.xaxis.set_minor_formatter("")  # within a power of ten their words would overlap
    if all(point.value > 0 for points in arms.values() for point in points):
        axes.set_yscale("log")
    for number, (name, points) in enumerate(arms.items()):
        fit, color = found["arms"][name], f"C{number}"
        law = Law(fit["unit"], fit["floor"], fit["scale"], fit["exponent"])
        compute = [point.compute for point in points]
        line = np.geomspace(min(compute), max(compute), 100)
        floor = "floor + " if law.floor else ""
        label = f"{name or 'runs'}: {floor}compute^{-fit['exponent']:.3g}"
        axes.plot(compute, [point.value for point in points], "o", color=color, markersize=4)
        axes.plot(line, law.at(line), "-", color=color, label=label)
    axes.set_xlabel("training FLOPs")
    axes.set_ylabel(metric)
    axes.grid(alpha=0.3, which="both")
    axes.legend(framealpha=0.5)


def describe(fits: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown of some fits, by metric."""
    lines = ["", "## Against compute", ""]
    lines += ["| metric | arm | exponent (95%) | parity ratio of compute (95%) | runs |", "|---" * 5 + "|"]
    for metric, found in fits.items():
        for name, fit in found["arms"].items():
            exponent = f"{fit['exponent']:.3g}{_bounds(fit['exponent_interval'])}"
            ratio = "baseline" if name == found["baseline"] else parity(fit)
            lines.append(f"| {metric} | {name or 'all'} | {exponent} | {ratio} | {fit['runs']} |")
    return "\n".join(lines) + "\n"


def parity(fit: Mapping[str, Any]) -> str:
    """An arm's parity ratio, and its interval where there is one."""
    value = "never" if fit["parity"] is None else f"{fit['parity']:.3g}"
    return f"{value}{_bounds(fit['parity_interval'])}"


def _bounds(interval: Sequence[float | None] | None) -> str:
    if not interval:
        return ""
    low, high = ("∞" if bound is None else f"{bound:.3g}" for bound in interval)
    return f" ({low} to {high})"
