"""Plots of the claims: arms side by side with a point of each seed, and figures against compute.

A plot's PNG has the hashes of the results that it was drawn from, as text under SOURCES.
"""

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from textwrap import fill

from claims_list import CAPTIONS, HELD_OUT, SEEN, TEXT
from claims_rows import (
    MIN_SEEDS,
    NORMAL,
    Claim,
    Measured,
    Row,
    Side,
    half_width,
    load_runs,
    measure,
    rate,
)
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from megafusion.errors import UserError
from megafusion.storage import file_sha256
from megafusion.sweep.fit import Point, fit_arms
from megafusion.sweep.plot import COMPUTE, draw_laws, parity

SOURCES = "Results"
"""Key of a PNG's text: a line with name and SHA-256 of each file of results."""
COLUMNS = 4
PANEL_WIDTH = 3.4
"""Inches."""
WIDTH = 38
"""Characters of a line of a panel's title."""
MIN_SPAN = 0.04
"""Least range of a loss's axis, as a share of its value."""
SIZED = re.compile(r"(.+)-\d+x\d+")
"""An arm of one size, as transfusion-6x192."""
NUMBERED = re.compile(r"\D+-(\d+)")
"""A side that a number tells from others, as patch-4: they stand in their order."""
COMPUTES = {
    "claims-compute-steps.png": (
        "4 x 128, 1,000 and 2,400 steps",
        {"sizes": "transfusion-4x128|quantized-4x128", "concepts-64": "transfusion|quantized"},
    ),
    "claims-compute-sizes.png": ("three sizes, 1,000 steps", {"sizes": "(transfusion|quantized)-.*"}),
}
"""Sheets of claim (a) against compute: what differs between computes, and patterns of arms by sweep."""
PARITY = {
    SEEN: ".029 by FID",
    HELD_OUT: ".029 by FID",
    CAPTIONS[0]: ".218",
    CAPTIONS[1]: ".218",
    TEXT[0]: ".489",
}
"""Figures against compute, and the paper's parity ratio."""


def draw_claims(claims: Sequence[Claim], results: Path, out: Path) -> list[Path]:
    """Write a sheet of each claim and sweep, with a panel for each figure that is measured; their paths."""
    sheets: dict[tuple[str, str], list[tuple[Claim, list[Measured], dict]]] = {}
    for claim in claims:
        runs = load_runs(claim.sweep, results)
        panels: dict[str, list[Measured]] = {}
        for row in claim.rows:
            if found := measure(row, runs):
                panels.setdefault(row.figure, []).append(found)
        if panels:
            sheet = sheets.setdefault((claim.letter, claim.sweep), [])
            sheet += [(claim, each, runs) for each in panels.values()]
    written = []
    for (letter, sweep), panels in sheets.items():
        figure, grid = _sheet(len(panels))
        for axes, panel in zip(grid, panels, strict=False):
            _draw_panel(axes, *panel)
        figure.suptitle(
            f"Claim {letter}, {sweep}. Colored: seeds, each another fold. Black: mean and 95% interval,\n"
            f"of {MIN_SEEDS} seeds or more, or of the drawings, the wider; none where neither gives one",
            fontsize=11,
        )
        pairs = [pair for _, found, _ in panels for each in found for pair in each.pairs]
        _add_seeds(figure, {seed for seed, *_ in pairs})
        written.append(out / f"claims-{letter.strip('()')}-{sweep}.png")
        _save(figure, written[-1], [results / f"{sweep}.json"])
    return written


def _add_seeds(figure: Figure, seeds: Iterable[str]) -> None:
    """Add a legend of the seeds' colors."""
    handles = [
        Line2D([], [], linestyle="", marker="o", color=_color(seed), label=f"seed {seed}")
        for seed in sorted(seeds, key=int)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=9)


def _color(seed: str) -> str:
    return f"C{int(seed) % 10}"


def _save(figure: Figure, path: Path, sources: Iterable[Path]) -> None:
    """Write a PNG that knows the results that it shows."""
    lines = [f"{source.name} {file_sha256(source)}" for source in sources if source.is_file()]
    figure.savefig(path, dpi=100, metadata={SOURCES: "\n".join(lines)})


def draw_computes(results: Path, out: Path) -> list[Path]:
    """Write the sheets of claim (a) against compute that have figures at two computes of both arms."""
    sheets = [_draw_compute(out / name, title, arms, results) for name, (title, arms) in COMPUTES.items()]
    return [sheet for sheet in sheets if sheet]


def _draw_compute(path: Path, title: str, wanted: Mapping[str, str], results: Path) -> Path | None:
    """Write a sheet; None where no figure is measured."""
    ours, baseline = "transfusion", "quantized"
    runs = {
        sweep: {k: run for k, run in load_runs(sweep, results).items() if re.fullmatch(arms, run["arm"])}
        for sweep, arms in wanted.items()
    }
    fitted = []
    for (name, metric, _), paper in PARITY.items():
        every = compute_points(runs, metric)
        arms = {arm: every[arm] for arm in (ours, baseline) if len({p.group for p in every.get(arm, ())}) > 1}
        if len(arms) < 2:
            print(f"{title}: no plot of {name}: not measured at two computes of both arms", file=sys.stderr)
            continue
        try:
            fitted.append((name, paper, arms, fit_arms(arms, baseline)))
        except UserError as error:
            print(f"{title}: no plot of {name}: {error}", file=sys.stderr)
    if not fitted:
        return None
    figure, grid = _sheet(len(fitted), height=3.6)
    for axes, (name, paper, arms, laws) in zip(grid, fitted, strict=False):
        draw_laws(axes, arms, laws, name)
        heads = f"parity at {parity(laws['arms'][ours])}", f"of the compute; paper: {paper}"
        axes.set_title("\n".join([name, *heads]), fontsize=8)
        axes.legend(fontsize=7, framealpha=0.5)
    figure.suptitle(
        f"Claim (a) against training compute, {title}: points are runs, lines power laws", fontsize=11
    )
    _save(figure, path, [results / f"{sweep}.json" for sweep in wanted])
    return path


def compute_points(sweeps: Mapping[str, Mapping[str, dict]], metric: str) -> dict[str, list[Point]]:
    """By arm without its size, the finished runs of some sweeps that have a metric and their compute."""
    arms: dict[str, list[Point]] = {}
    for sweep, runs in sweeps.items():
        for run in runs.values():
            figures, arm = run["metrics"], run["arm"]
            if run["state"] == "finished" and metric in figures and COMPUTE in figures:
                sized = SIZED.fullmatch(arm)
                point = Point(f"{sweep}/{arm}", figures[COMPUTE], figures[metric])
                arms.setdefault(sized[1] if sized else arm, []).append(point)
    return arms


def _sheet(number: int, height: float = 3.1) -> tuple[Figure, list[Axes]]:
    """A figure of so many panels."""
    columns = min(COLUMNS, number)
    rows = -(-number // columns)
    figure = Figure(figsize=(PANEL_WIDTH * max(columns, 2), height * rows + 0.5), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in grid[number:]:
        axes.set_axis_off()
    return figure, grid


def _draw_panel(axes: Axes, claim: Claim, found: Sequence[Measured], runs: dict[str, dict]) -> None:
    """The sides of comparisons of one figure: a point of each seed, joined, and mean with an error bar."""
    sides = list(dict.fromkeys([each.row.first for each in found] + [each.row.second for each in found]))
    if all(NUMBERED.fullmatch(side.name) for side in sides):
        sides.sort(key=lambda side: int(NUMBERED.fullmatch(side.name)[1]))
    values = {side: values_of(side, found) for side in sides}
    for seed in dict.fromkeys(seed for by_seed in values.values() for seed in by_seed):
        points = [(place, values[side][seed]) for place, side in enumerate(sides) if seed in values[side]]
        axes.plot(*zip(*points, strict=True), "-", color="0.8", linewidth=1, zorder=1)
        axes.plot(*zip(*points, strict=True), "o", color=_color(seed), markersize=6, zorder=2)
    for place, side in enumerate(sides):
        seen = list(values[side].values())
        mean, interval = fmean(seen), interval_of(side, values[side], runs)
        bar = interval and [[max(0.0, mean - interval[0])], [max(0.0, interval[1] - mean)]]
        axes.errorbar(place + 0.15, mean, bar, fmt="_k", markersize=11, capsize=4)
    axes.set_xticks(range(len(sides)), [side.name for side in sides], fontsize=10 if len(sides) < 4 else 7.5)
    axes.set_xlim(-0.45, len(sides) - 0.45)
    _set_range(axes, sides[0].metric)
    axes.grid(axis="y", alpha=0.3)
    heads = [f"{claim.letter} {claim.name}", found[0].row.figure, direction([each.row for each in found])]
    axes.set_title("\n".join(fill(head.replace("`", ""), WIDTH) for head in heads), fontsize=10)


def values_of(side: Side, found: Sequence[Measured]) -> dict[str, float]:
    """A side's value of each seed, in any of the comparisons."""
    return {
        seed: pair[place]
        for each in found
        for place in (0, 1)
        if each.row[1 + place] == side
        for seed, *pair in each.pairs
    }


def interval_of(
    side: Side, values: Mapping[str, float], runs: Mapping[str, dict]
) -> tuple[float, float] | None:
    """The 95% interval of a side's mean, the wider as of a difference; None where that would have none."""
    found = []
    if len(values) >= MIN_SEEDS:
        mean, half = fmean(values.values()), half_width(list(values.values()))
        found.append((mean - half, mean + half))
    measured = [
        run["metrics"]
        for run in runs.values()
        if run["arm"] == side.arm and run["point"]["seed"] in values and side.metric in run["metrics"]
    ]
    if of_drawings := rate(side.metric, measured, added=2):
        share, error = of_drawings
        found.append((max(0.0, share - NORMAL * error), min(1.0, share + NORMAL * error)))
    return max(found, key=lambda ends: ends[1] - ends[0], default=None)


def _set_range(axes: Axes, metric: str) -> None:
    """Begin an axis at 0; for a loss, show at least MIN_SPAN of its value, so that noise looks like noise."""
    axes.margins(y=0.15)
    low, high = axes.get_ylim()
    if "loss" in metric or "bits" in metric:
        missing = max(0, MIN_SPAN * high - (high - low)) / 2
        axes.set_ylim(low - missing, high + missing)
    else:
        high = max(1.08 * high, 0.1)
        axes.set_ylim(-0.03 * high, high)


def direction(rows: Sequence[Row]) -> str:
    """The claim, as an order of the sides' values."""
    orders: dict[tuple[int, str], list[str]] = {}
    for row in rows:
        if row.better:
            orders.setdefault((row.better, row.first.name), []).append(row.second.name)
    said = [f"{first} {'>' if sign > 0 else '<'} {', '.join(each)}" for (sign, first), each in orders.items()]
    return f"claimed: {'; '.join(said)}" if said else "no direction claimed"
