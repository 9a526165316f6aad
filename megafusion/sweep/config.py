"""Configuration of a sweep: which runs over which base, and what is measured of each. Imports no torch."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from megafusion.config import Config, parse_config
from megafusion.evaluate.config import SuiteName
from megafusion.yaml_values import load_values

NAME = re.compile(r"(?!sweep\.)[\w+-][\w.+-]*")
"""Names of arms and of values: parts of folders' names, which shells and sbatch read. Files of the sweep
itself are named sweep.*."""


class ArmConfig(Config):
    """One recipe of a sweep, trained once for each point of the grid."""

    base: Path | None = None
    """Configuration of this arm's runs, in place of the sweep's."""
    overrides: tuple[str, ...] = ()
    """Values over the base, as `key.path=value`. A list in the arm's place is this key."""
    evaluate: tuple[str, ...] = ()
    """Values over the sweep's `evaluate`, as `sampling.guidance_scale=3`."""


class EvaluationConfig(Config):
    """Measurements of each run when it is trained."""

    suites: tuple[SuiteName, ...] = Field(min_length=1)
    """Suites of `megafusion evaluate`."""
    options: dict[str, Any] = Field({})
    """Keys of `megafusion evaluate`."""


class SweepConfig(Config):
    """A sweep: every arm of `runs` at every point of `grid`.

    In overrides and in `evaluate`, {key} stands for the run's value of that key of the grid.
    """

    base: Path
    """Configuration of a run, as of `megafusion train`."""
    out: Path
    """Folder of the sweep: a run folder for each run, sweep.json, sweep.md."""
    overrides: tuple[str, ...] = ()
    """Values over the base for every run, as `key.path=value`."""
    runs: dict[str, ArmConfig] = Field({})
    """Arms by name: recipes that are compared. Without any, the grid alone is trained."""
    grid: dict[str, list[Any] | dict[str, Any]] = Field({})
    """By key of a run: a list of values, or values by name where they are no plain words or numbers, as
    `model: {small: {num_layers: 4}, large: {num_layers: 8}}`. Runs that differ in `seed` alone are a
    group."""
    evaluate: EvaluationConfig | None = None
    """Measurements of each run; none by default."""

    @model_validator(mode="after")
    def _named(self) -> "SweepConfig":
        if not self.runs and not self.grid:
            raise ValueError("neither runs nor grid: name what differs between the runs of the sweep")
        for key, values in self.grid.items():
            if not values:
                raise ValueError(f"grid.{key} is empty; give it a value, or leave it out")
            labels = list(values) if isinstance(values, dict) else [label(value) for value in values]
            if wrong := next((each for each in labels if not NAME.fullmatch(each)), None):
                raise ValueError(
                    f"grid.{key}: {wrong} cannot be part of a folder's name; write the values by name, as "
                    "{first: VALUE, second: VALUE}, of letters, digits and .+-_"
                )
            if twice := next((each for each in labels if labels.count(each) > 1), None):
                raise ValueError(
                    f"grid.{key}: {twice} is there twice, and both runs would write one folder; leave one out"
                )
        for name in self.runs:
            if not NAME.fullmatch(name):
                raise ValueError(
                    f"runs: {name!r} cannot be a folder's name here: letters, digits and .+-_, not sweep.*; "
                    "choose another"
                )
        return self


def load_sweep(path: Path, overrides: Sequence[str] = ()) -> SweepConfig:
    """Read a sweep's file, as `load_config` does; an arm may be written as the list of its overrides."""
    values = load_values(path, overrides)
    if isinstance(arms := values.get("runs"), dict):
        values["runs"] = {
            name: {"overrides": arm} if isinstance(arm, list) else arm for name, arm in arms.items()
        }
    return parse_config(SweepConfig, values, str(path))


def label(value: Any) -> str:
    """A value of the grid as part of a run's name."""
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)
