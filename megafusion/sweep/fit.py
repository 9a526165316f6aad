"""Metrics against training compute: a power law for each arm, and the parity ratio of compute between arms.

A law is metric = floor + scale x compute^-exponent (arXiv 2001.08361; the floor as in arXiv 2203.15556). The
parity ratio is Transfusion's (arXiv 2408.11039, table 3): the compute at which an arm's law reaches what the
baseline's has at its largest compute, as a share of that.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import curve_fit

from megafusion.errors import UserError

NUM_RESAMPLES = 300
COVERAGE = (2.5, 97.5)
"""Percentiles of a confidence interval."""
MIN_COMPUTES_WITH_FLOOR = 4


class Point(NamedTuple):
    """A run: its group, whose runs differ in the seed alone, its compute in FLOPs, its metric."""

    group: str
    compute: float
    value: float


@dataclass(frozen=True)
class Law:
    """A power law in compute: floor + scale x (compute / unit)^-exponent."""

    unit: float
    floor: float
    scale: float
    exponent: float

    def at(self, compute: Any) -> Any:
        """The metric at some compute."""
        return self.floor + self.scale * (np.asarray(compute) / self.unit) ** -self.exponent

    def compute_for(self, value: float) -> float:
        """The compute at which the law reaches a value; infinite for one that it never reaches, or at no
        compute that is a number."""
        share = (value - self.floor) / self.scale
        if share <= 0 or not self.exponent:
            return math.inf
        try:
            return self.unit * share ** (-1 / self.exponent)
        except OverflowError:  # a law that is nearly flat
            return math.inf


def fit_law(points: Sequence[Point]) -> Law:
    """The law nearest to some runs, by least squares.

    With fewer than four groups, its floor is 0 and it is a line in logarithms. ValueError or RuntimeError
    where there is no such law.
    """
    compute, values = np.array([[point.compute, point.value] for point in points]).T
    unit = float(np.exp(np.log(compute).mean()))
    if len({point.group for point in points}) < MIN_COMPUTES_WITH_FLOOR:
        if (values <= 0).any():
            raise ValueError("a power law without a floor needs values above 0")
        slope, intercept = np.polyfit(np.log(compute / unit), np.log(values), 1)
        return Law(unit, 0.0, float(np.exp(intercept)), float(-slope))
    order = np.argsort(compute)
    fall = float(values[order[0]] - values[order[-1]]) or 1e-3
    (floor, scale, exponent), _ = curve_fit(
        lambda c, floor, scale, exponent: floor + scale * c**-exponent,
        compute / unit,
        values,
        p0=(values[order[-1]] - fall / 2, fall, 0.3),
        bounds=((-np.inf, -np.inf, 1e-3), (np.inf, np.inf, 5.0)),
        x_scale=(abs(fall), abs(fall), 0.3),
        ftol=1e-12,
        xtol=1e-12,
        gtol=1e-12,
        max_nfev=4000,
    )
    return Law(unit, float(floor), float(scale), float(exponent))


def fit_arms(arms: Mapping[str, Sequence[Point]], baseline: str, seed: int = 0) -> dict[str, Any]:
    """Laws of all arms with their confidence intervals, and each one's parity ratio against the baseline.

    Intervals are of a bootstrap over the runs of each group, and None where no group has two. Raises
    UserError naming an arm that has no law.
    """
    if baseline not in arms:
        raise UserError(f"--baseline {baseline!r}: no arm of the sweep; they are {', '.join(arms)}")
    laws = {}
    for name, points in arms.items():
        if len({point.group for point in points}) < 2:
            raise UserError(
                f"{name or 'sweep'}: a fit needs the metric at two computes or more, and has "
                f"{len({point.group for point in points})}; vary size or steps in grid, and train them"
            )
        try:
            laws[name] = fit_law(points)
        except (ValueError, RuntimeError) as error:
            raise UserError(f"{name or 'sweep'}: no power law fits its runs: {error}") from error
    top = max(point.compute for point in arms[baseline])
    samples = _bootstrap(arms, np.random.default_rng(seed))
    found: dict[str, Any] = {"baseline": baseline, "compute": top, "arms": {}}
    for name, law in laws.items():
        exponents = [each[name].exponent for each in samples]
        ratios = [_ratio(each[name], each[baseline], top) for each in samples]
        found["arms"][name] = {
            "floor": law.floor,
            "scale": law.scale,
            "unit": law.unit,
            "exponent": law.exponent,
            "exponent_interval": _interval(exponents),
            "parity": _finite(_ratio(law, laws[baseline], top)),
            "parity_interval": _interval(ratios) if name != baseline else None,
            "runs": len(arms[name]),
        }
    return found


def _ratio(law: Law, baseline: Law, compute: float) -> float:
    return law.compute_for(float(baseline.at(compute))) / compute


def _bootstrap(arms: Mapping[str, Sequence[Point]], random: np.random.Generator) -> list[dict[str, Law]]:
    """Laws of all arms for resampled runs; none where no group has two runs."""
    if all(len({p.group for p in points}) == len(points) for points in arms.values()):
        return []
    samples = []
    for _ in range(NUM_RESAMPLES):
        try:
            samples.append({name: fit_law(_resample(points, random)) for name, points in arms.items()})
        except (ValueError, RuntimeError):
            continue
    return samples


def _resample(points: Sequence[Point], random: np.random.Generator) -> list[Point]:
    """Runs sampled with replacement within each group, so that no compute is lost."""
    groups: dict[str, list[Point]] = {}
    for point in points:
        groups.setdefault(point.group, []).append(point)
    return [each[index] for each in groups.values() for index in random.integers(0, len(each), len(each))]


def _interval(values: Sequence[float]) -> list[float | None] | None:
    """Bounds of the middle 95%; None for one that is infinite, and without values."""
    if not values:
        return None
    return [_finite(float(value)) for value in np.percentile(values, COVERAGE, method="nearest")]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
