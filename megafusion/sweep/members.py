"""The runs of a sweep, each checked before the first is started. Imports no torch."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from megafusion.config import dump_config, parse_config
from megafusion.errors import UserError
from megafusion.evaluate.config import EvaluateConfig
from megafusion.resilience.attempts import read_attempts
from megafusion.sweep.config import ArmConfig, SweepConfig, label
from megafusion.sweep.evaluation_files import evaluation_sha256, missing_files
from megafusion.train.from_data import load_training_config
from megafusion.train.inputs import missing_inputs
from megafusion.train.run_folder import FREE_KEYS, LOCATION, run_changes
from megafusion.yaml_values import apply_overrides, load_values, parse_yaml

RESULTS = "sweep.json"
"""Figures of every run of a sweep, in its folder."""
SEED = "seed"
"""The axis over which the runs of a group differ."""
UNMEASURED_KEYS = tuple(set(FREE_KEYS) - {"data.validation", "sampling."})
"""Keys that change no figure that a sweep compares."""


Point = Sequence[tuple[str, str, Any]]
"""A place in the grid: key, the value's name, and the value, of each key."""


@dataclass(frozen=True)
class Member:
    """A run of a sweep, with its evaluation."""

    name: str
    arm: str
    point: dict[str, str]
    """Its place in the grid: the name of its value, by key."""
    out: Path
    results: Path
    """Folder of its evaluation: one for each number of steps, suites, options, and contents of the files that
    these name."""
    num_steps: int
    config: str
    """Its configuration in full, as YAML."""
    suites: tuple[str, ...]
    evaluation: EvaluateConfig
    check_degrees: Callable[[int], None]
    missing: tuple[str, ...]
    """Inputs that this machine does not see."""

    def check_world_size(self, world_size: int) -> None:
        """Raise UserError unless the run's degrees of parallelism fill so many ranks."""
        try:
            self.check_degrees(world_size)
        except UserError as error:
            raise UserError(f"{self.name}: {error}") from error

    @property
    def group(self) -> str:
        """The name without the seed."""
        return _name(self.arm, {key: value for key, value in self.point.items() if key != SEED})

    @property
    def report(self) -> Path:
        """The report that `megafusion evaluate` writes when every suite is measured."""
        return self.results / "report.json"

    @property
    def is_trained(self) -> bool:
        """Whether every step is made and the model is published."""
        ends = [each["step"] for each in read_attempts(self.out) if each["ended"] == "finished"]
        return ends[-1:] == [self.num_steps] and (self.out / "pipeline").is_dir()

    @property
    def is_evaluated(self) -> bool:
        """Whether the evaluation that the sweep asks for is there."""
        return not self.suites or self.report.is_file()

    @property
    def is_done(self) -> bool:
        """Whether nothing of it is left to do."""
        return self.is_trained and self.is_evaluated


def expand(sweep: SweepConfig, origin: str) -> list[Member]:
    """Every run of a sweep. Raises UserError naming the file, the run and the key that is wrong."""
    axes = [[(key, name, value) for name, value in _values(values)] for key, values in sweep.grid.items()]
    return [_member(sweep, origin, arm, point) for arm in _arms(sweep) for point in product(*axes)]


def earlier_members(
    sweep: SweepConfig, origin: str, recorded: Mapping[str, dict[str, Any]], members: Sequence[Member]
) -> list[Member]:
    """Runs of a sweep at other values of its grid, whose results and folders are there from earlier calls.

    recorded: runs of the folder's sweep.json. Raises UserError for one that the sweep cannot have made: of no
    arm of it, of other keys, of a value that its file does not name any more, or of another recipe.
    """
    path = sweep.out / RESULTS
    short, found, names = _short_names(list(sweep.grid)), [], {member.name for member in members}
    for name, run in recorded.items():
        if name in names or not (sweep.out / name / "config.yaml").is_file():
            continue
        labels = run["point"]
        if run["arm"] not in _arms(sweep) or labels.keys() != set(short.values()):
            raise UserError(_strange(sweep.out, name, "no run of this sweep"))
        point = []
        for key, values in sweep.grid.items():
            text = labels[short[key]]
            if isinstance(values, dict) and text not in values:
                raise UserError(_strange(sweep.out, name, f"of a value that grid.{key} does not have"))
            own = values[text] if isinstance(values, dict) else _own_value(sweep.out / name, key, text)
            point.append((key, text, own))
        try:
            found.append(_member(sweep, origin, run["arm"], point))
        except UserError as error:
            raise UserError(
                f"{path} has {name} of an earlier call: {error}; or remove its entry there, and its folder"
            ) from error
    return found


def left_nothing(
    sweep: SweepConfig, recorded: Mapping[str, dict[str, Any]], members: Sequence[Member]
) -> dict[str, dict[str, Any]]:
    """Recorded runs of earlier calls without figures that have no folder, or whose arm is no more."""
    asked, arms = {member.name for member in members}, _arms(sweep)
    return {
        name: run
        for name, run in recorded.items()
        if name not in asked
        and not run["metrics"]
        and not (run["arm"] in arms and (sweep.out / name).is_dir())
    }


def _own_value(run: Path, key: str, text: str) -> Any:
    """The value of a run that has a label, by the run's configuration: labels of 1 and "1" are the same."""
    value: Any = load_values(run / "config.yaml")
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            return parse_yaml(text)
        value = value[part]
    return text if isinstance(value, str) else value  # a path is absolute there


def _strange(out: Path, name: str, why: str) -> str:
    return (
        f"{out / RESULTS}: holds results of {name}, {why}; choose another out, or remove {out / name} "
        "and its entry there"
    )


def _arms(sweep: SweepConfig) -> dict[str, ArmConfig]:
    return sweep.runs or {"": ArmConfig()}


def _member(sweep: SweepConfig, origin: str, arm: str, point: Point) -> Member:
    short = _short_names(list(sweep.grid))
    labels = {short[key]: name for key, name, _ in point}
    name = _name(arm, labels)
    try:
        return _checked_member(sweep, name, arm, point, labels)
    except UserError as error:
        place = f"runs.{arm}" if arm else "grid"
        raise UserError(f"{origin}: {place} ({name}): {error}") from error


def _checked_member(
    sweep: SweepConfig, name: str, arm_name: str, point: Point, labels: dict[str, str]
) -> Member:
    arm = _arms(sweep)[arm_name]
    overrides = [_filled(each, labels) for each in (*sweep.overrides, *arm.overrides)]
    if any(override.partition("=")[0] == "out" for override in overrides):
        raise UserError("override 'out': the sweep gives each run its folder; remove it")
    _refuse_undone(point, overrides)
    grid = [f"{key}={json.dumps(value)}" for key, _, value in point]
    out = sweep.out / name
    chosen = [*grid, *overrides, f"out={json.dumps(str(out))}"]
    run = load_training_config(arm.base or sweep.base, chosen)
    _refuse_other_figures(run)
    suites: tuple[str, ...] = ()
    options = EvaluateConfig()
    if sweep.evaluate:
        values = apply_overrides(sweep.evaluate.options, arm.evaluate)
        filled = {key: _filled(value, labels) for key, value in values.items()}
        suites, options = sweep.evaluate.suites, parse_config(EvaluateConfig, filled, "evaluate.options")
        options.check_suites(suites)
    elif arm.evaluate:
        raise UserError("has an evaluate of its own, but the sweep has none; add evaluate.suites")
    missing = [*missing_inputs(run), *missing_files(options)]
    return Member(
        name,
        arm_name,
        labels,
        out,
        out / f"evaluation-{run.train.num_steps}-{evaluation_sha256(suites, options)[:8]}",
        run.train.num_steps,
        dump_config(run),
        tuple(suites),
        options,
        run.check_degrees,
        tuple(missing),
    )


def _refuse_undone(point: Point, overrides: list[str]) -> None:
    """UserError if a value of the grid is replaced, by an override or by another key of the grid."""
    axes = [(key, leaf) for key, _, value in point for leaf in _leaves(value, key)]
    setters = [(f"grid.{key}", key, leaf) for key, leaf in axes]
    for override in overrides:
        name = f"override {override.partition('=')[0]!r}"
        setters += [(name, "", leaf) for leaf in _leaves(apply_overrides({}, [override]))]
    for setter, own, leaf in setters:
        for key, other in axes:
            if own != key and (f"{leaf}.".startswith(f"{other}.") or f"{other}.".startswith(f"{leaf}.")):
                raise UserError(f"{setter} undoes grid.{key}; leave one of them out")


def _leaves(value: Any, key: str = "") -> list[str]:
    """Dotted keys of a value's innermost values."""
    if not isinstance(value, dict):
        return [key]
    return [leaf for name, each in value.items() for leaf in _leaves(each, f"{key}.{name}".lstrip("."))]


def _refuse_other_figures(run: Any) -> None:
    """UserError if the folder holds a run whose figures are not of this configuration.

    A run may become longer, and a location may be another when the earlier one is gone: training compares the
    files.
    """
    way_out = "choose another out for the sweep, or remove that folder"
    for key, (old, new) in (run_changes(run) or {}).items():
        is_longer = key == "train.num_steps" and new > old
        is_moved = LOCATION.fullmatch(key) and not Path(str(old)).exists()
        if not (key.startswith(UNMEASURED_KEYS) or is_longer or is_moved):
            raise UserError(f"{run.out}: holds a run with {key} {old} instead of {new}; {way_out}")
    step = max((each["step"] for each in read_attempts(run.out)[-1:]), default=0)
    if step > (end := run.train.num_steps):
        raise UserError(f"{run.out}: has trained {step} steps, more than train.num_steps {end}; {way_out}")


def _values(values: list[Any] | dict[str, Any]) -> list[tuple[str, Any]]:
    if isinstance(values, dict):
        return list(values.items())
    return [(label(value), value) for value in values]


def _short_names(keys: list[str]) -> dict[str, str]:
    """The last parts of dotted keys, where no two are the same."""
    leaves = [key.rpartition(".")[2] for key in keys]
    return {key: leaf if leaves.count(leaf) == 1 else key for key, leaf in zip(keys, leaves, strict=True)}


def _name(arm: str, labels: dict[str, str]) -> str:
    return ",".join(filter(None, [arm, *(f"{key}={value}" for key, value in labels.items())]))


def _filled(value: Any, labels: dict[str, str]) -> Any:
    """A value, or those within it, with {key} replaced by the run's value of that key of the grid."""
    if isinstance(value, dict):
        return {key: _filled(each, labels) for key, each in value.items()}
    if isinstance(value, list):
        return [_filled(each, labels) for each in value]
    if not isinstance(value, str):
        return value

    def replace(match: re.Match[str]) -> str:
        if match[1] not in labels:
            known = ", ".join(f"{{{key}}}" for key in labels) or "nothing, because there is no grid"
            raise UserError(f"{value!r}: {match[0]} stands for no key of the grid, which gives {known}")
        return labels[match[1]]

    return re.sub(r"\{([\w.]+)\}", replace, value)
