"""A row of a table of claims: the figures of two arms over seeds, their interval, and the verdict."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

from scipy.stats import t as student

from megafusion.storage import read_json

RESULTS = Path(__file__).parent / "results" / "claims"
RATE = re.compile(r"((captions|images)/[\w-]+)/(\w*accuracy|exact_match|nearest_seen_\w+)")
"""Shares of drawings or captions, whose number is beside them."""
HALVES = {"validation_image_loss_less_noised": range(5), "validation_image_loss_more_noised": range(5, 10)}
"""Held-out image loss at t < 0.5 and above: the mean of five of its ten ranges of t."""
RANGES = {"validation_image_loss_by_range": range(10), **HALVES}
"""Means over ranges of t, which do not depend on how many images of each range were drawn."""
EXPLORATORY = " (exploratory)"
"""Ends a figure that was chosen when runs had been seen (docs/claims.md)."""
MIN_SEEDS = 3
"""Seeds whose spread gives an interval; of fewer, the number of drawings does."""
NORMAL = 1.96
"""Standard errors in half of a 95% interval."""


class Side(NamedTuple):
    """One side of a comparison: a metric of an arm, and its name in a plot."""

    name: str
    arm: str
    metric: str


class Row(NamedTuple):
    """A comparison. better: sign of first - second that agrees with the claim; 0 where it says none."""

    figure: str
    first: Side
    second: Side
    better: int
    detail: str = ""
    """Which of several comparisons of one figure."""


class Claim(NamedTuple):
    """Comparisons within one sweep. compared: what with what. paper: its figures. main: figures of the short
    table."""

    letter: str
    name: str
    compared: str
    paper: str
    sweep: str
    rows: tuple[Row, ...]
    main: tuple[str, ...] = ()


class Measured(NamedTuple):
    """A row's figures, paired by seed: (seed, first, second)."""

    row: Row
    pairs: tuple[tuple[str, float, float], ...]
    interval: float | None
    """Half the width of the difference's 95% interval: the wider of Student's t over MIN_SEEDS or more and of
    that of the number of drawings; None for a figure that has neither."""
    flops: tuple[float | None, float | None]

    @property
    def differences(self) -> list[float]:
        return [first - second for _, first, second in self.pairs]

    @property
    def verdict(self) -> str:
        """Words on the difference: whether its interval, if it has one, excludes 0, and its sign."""
        seeds, difference = len(self.pairs), fmean(self.differences)
        if not self.row.better:
            return ""
        agrees = difference * self.row.better > 0
        if self.interval is None:
            said = "same sign" if agrees else "other sign" if difference else "no difference"
        elif abs(difference) <= self.interval:
            said = "not shown at this size"
        else:
            said = "agrees" if agrees else "does not agree"
            is_bold = seeds >= MIN_SEEDS and not self.row.figure.endswith(EXPLORATORY)
            said = f"**{said}**" if is_bold else said
        return said if seeds >= MIN_SEEDS else f"{said}, {seeds} seed{'s' * (seeds > 1)}"


def load_runs(sweep: str, folder: Path = RESULTS) -> dict[str, dict]:
    """The runs of a committed sweep; none where there is no file yet."""
    path = folder / f"{sweep}.json"
    return read_runs(path, "restore it") if path.is_file() else {}


def read_runs(path: Path, way_out: str) -> dict[str, dict]:
    """The runs of a sweep.json, with RANGES where the ranges of t were measured."""
    runs = read_json(path, way_out)["runs"]
    for metrics in (run["metrics"] for run in runs.values()):
        for name, buckets in RANGES.items():
            losses = [metrics.get(f"validation_image_loss_t{bucket}") for bucket in buckets]
            if None not in losses:
                metrics[name] = fmean(losses)
    return runs


def of_arm(runs: dict[str, dict], arm: str) -> dict[str, dict[str, float]]:
    """The figures of an arm's finished runs, by seed."""
    return {
        run["point"]["seed"]: run["metrics"]
        for run in runs.values()
        if run["arm"] == arm and run["state"] == "finished"
    }


def measure(row: Row, runs: dict[str, dict]) -> Measured | None:
    """A row's figures of the seeds that have both sides; None without any."""
    found = [
        {seed: metrics for seed, metrics in of_arm(runs, side.arm).items() if side.metric in metrics}
        for side in (row.first, row.second)
    ]
    seeds = sorted(found[0].keys() & found[1].keys(), key=int)
    if not seeds:
        return None
    pairs = tuple(
        (seed, found[0][seed][row.first.metric], found[1][seed][row.second.metric]) for seed in seeds
    )
    flops = [[by_seed[seed].get("flops") for seed in seeds] for by_seed in found]
    means = tuple(fmean(known) if (known := [f for f in each if f]) else None for each in flops)
    differences = [first - second for _, first, second in pairs]
    sides = zip((row.first.metric, row.second.metric), found, strict=True)
    runs_of = [(metric, [by_seed[seed] for seed in seeds]) for metric, by_seed in sides]
    intervals = [rates_half_width(fmean(differences), *runs_of)]
    if len(seeds) >= MIN_SEEDS:
        intervals.append(half_width(differences))
    interval = max((each for each in intervals if each is not None), default=None)
    return Measured(row, pairs, interval, means)


def half_width(values: Sequence[float]) -> float:
    """Half the width of a mean's 95% interval, of Student's t."""
    return float(student.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))


def rates_half_width(difference: float, *sides: tuple[str, Sequence[dict[str, float]]]) -> float | None:
    """Half the width of a 95% interval about the difference of two shares that holds Agresti and Caffo's.

    Theirs, which adds a success and a failure to each side, lies about a smaller difference. Against chance,
    which has no error, it is Agresti and Coull's of one share, which adds two of each. sides: metric and runs
    of both; None if one is no share.
    """
    added = 2 if any(metric.endswith("_chance") for metric, _ in sides) else 1
    rates = [rate(metric, runs, added) for metric, runs in sides]
    if None in rates:
        return None
    (first, first_error), (second, second_error) = rates
    return NORMAL * math.hypot(first_error, second_error) + abs(difference - (first - second))


def rate(metric: str, runs: Sequence[dict[str, float]], added: int) -> tuple[float, float] | None:
    """A share of the drawings or captions of some runs, and its standard error.

    added: successes, and as many failures, that are counted beside the observed ones, so that shares near 0
    and 1 have an error. The error of chance is 0. None for a figure that is no share, or whose number is not
    recorded.
    """
    if metric.endswith("_chance"):
        return fmean(run[metric] for run in runs), 0.0
    match = RATE.fullmatch(metric)
    if not match or any(f"{match[1]}/images" not in run for run in runs):
        return None
    numbers = [run[f"{match[1]}/images"] for run in runs]
    successes = sum(run[metric] * number for run, number in zip(runs, numbers, strict=True))
    total = sum(numbers) + 2 * added
    share = (successes + added) / total
    return share, math.sqrt(share * (1 - share) / total)


def table(claims: Sequence[Claim], folder: Path = RESULTS) -> str:
    """Markdown of all claims: a line for each figure, one for a claim that has not been run, and how many
    intervals exclude 0 by chance alone."""
    head = "| claim | the paper | figure | here | difference | seeds | TFLOP | verdict |"
    lines, compared = [head, "|---" * 8 + "|"], 0
    for claim in claims:
        runs = load_runs(claim.sweep, folder)
        place = f"| {claim.letter} {claim.name}: {claim.compared} | {claim.paper} |"
        found = [each for row in claim.rows if (each := measure(row, runs))]
        if not found:
            lines.append(f"{place} | not run yet | | | | |")
        for each in found:
            lines.append(f"{place} {_cells(each)} |")
            place = "| | |"
            compared += bool(each.row.better and each.interval is not None)
    chance = f"if no difference were real, about {compared / 20:.0f} of them would exclude 0 by chance"
    return "\n".join([*lines, "", f"{compared} rows have an interval, of 95%: {chance}."]) + "\n"


def main_claims(claims: Sequence[Claim]) -> list[Claim]:
    """The claims of the short table, each with its main rows alone."""
    return [
        claim._replace(rows=tuple(row for row in claim.rows if row.figure in claim.main))
        for claim in claims
        if claim.main
    ]


def _cells(found: Measured) -> str:
    digits = 4 if "loss" in found.row.first.metric else 2
    values = " vs ".join(_spread([pair[place] for pair in found.pairs], digits) for place in (1, 2))
    difference = f"{fmean(found.differences):+.{digits}f}"
    if found.interval is not None:
        difference += f" ± {found.interval:.{digits}f}"
    figure = ", ".join(filter(None, (found.row.figure, found.row.detail)))
    cells = [figure, values, difference, str(len(found.pairs)), _flops(found.flops), found.verdict]
    return " | ".join(cells)


def _flops(sides: Sequence[float | None]) -> str:
    """TFLOP of both sides, once if they are equal; empty if neither is known."""
    said = dict.fromkeys(f"{each / 1e12:.1f}" if each else "-" for each in sides)
    return " vs ".join(said) if any(sides) else ""


def _spread(values: Sequence[float], digits: int) -> str:
    """Mean ± sample standard deviation; of a single value, the value."""
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}{spread}"
