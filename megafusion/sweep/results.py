"""Results of a sweep: sweep.json, with every run's figures and the mean of each group, and sweep.md."""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from megafusion.errors import UserError
from megafusion.resilience.attempts import is_running, lock, read_attempts
from megafusion.storage import read_json, write_file
from megafusion.sweep.members import RESULTS, Member
from megafusion.telemetry.metrics_file import METRICS, read_metrics

TABLE, LOCK = "sweep.md", "sweep.lock"
LOCK_SECONDS = 300.0
ENTRY = {
    "state": str,
    "step": int,
    "num_steps": int,
    "arm": str,
    "group": str,
    "point": dict,
    "metrics": dict,
}
"""Types of a run's entry in sweep.json; `error` is text or null."""
FAILED = "failed"
FINISHED = "finished"
"""State of a run that is trained, and evaluated where the sweep evaluates."""
TRAINING = re.compile("text_loss|image_loss|seconds|flops|validation_.*")
"""Figures of a run's metrics, each of the last line that has it."""


def recorded_runs(out: Path) -> dict[str, dict[str, Any]]:
    """The runs of a folder's sweep.json, by name; none without that file. UserError for a malformed one."""
    path, way_out = out / RESULTS, "restore it, or remove it to gather the run folders anew"
    if not path.is_file():
        return {}
    runs = read_json(path, way_out).get("runs")
    if not isinstance(runs, dict):
        raise UserError(f"{path}: has no mapping of runs; {way_out}")
    for name, run in runs.items():
        if not isinstance(run, dict) or any(
            not isinstance(run.get(key), kind) for key, kind in ENTRY.items()
        ):
            raise UserError(f"{path}: runs.{name} is not a run of a sweep; {way_out}")
    return runs


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Hold the lock on a sweep's results, which several calls may write. UserError if it is not released."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / LOCK).open("w") as file:
        if not lock(file.fileno(), LOCK_SECONDS):
            raise UserError(
                f"{out / LOCK}: locked for {LOCK_SECONDS:.0f} s by another call; run this one again"
            )
        yield


def write_results(
    out: Path,
    members: Sequence[Member],
    errors: Mapping[str, str],
    earlier: Sequence[Member] = (),
    forgotten: Mapping[str, dict[str, Any]] | None = None,
    add: Callable[[dict[str, Any]], str] | None = None,
) -> dict[str, Any]:
    """Write sweep.json and sweep.md, and return what sweep.json holds.

    It has the figures of every run from its folder, and the entries of sweep.json of all other runs as they
    are. Those are runs of other calls, which may be running, and of folders that are gone. Groups are of
    finished runs alone: the figures of others are not yet what their recipe leads to. errors: what members
    have just failed with, by name. earlier: members of earlier calls. forgotten: entries that are left out
    unless they have changed. add: adds to what is written already, and returns Markdown for the end of
    sweep.md.
    """
    with _locked(out):
        results = _gather(out, members, errors, earlier, forgotten or {})
        _write_files(out, results)
        if add:
            _write_files(out, results, add(results))
    return results


def _gather(
    out: Path,
    members: Sequence[Member],
    errors: Mapping[str, str],
    earlier: Sequence[Member],
    forgotten: Mapping[str, dict[str, Any]],
) -> dict[str, Any]:
    recorded = recorded_runs(out)
    runs = {member.name: _run(member, errors.get(member.name)) for member in members}
    runs |= {member.name: _run(member, _kept_error(member, recorded)) for member in earlier}
    runs |= {name: run for name, run in recorded.items() if name not in runs and run != forgotten.get(name)}
    groups: dict[str, list[dict]] = {}
    for run in runs.values():
        if run["state"] == FINISHED:
            groups.setdefault(run["group"], []).append(run["metrics"])
    return {"runs": runs, "groups": {name: _spread(each) for name, each in groups.items()}}


def _kept_error(member: Member, recorded: Mapping[str, dict[str, Any]]) -> str | None:
    """The failure that the member's own call has recorded, unless it runs again or is done."""
    run = recorded.get(member.name, {})
    failed = run.get("state") == FAILED and not member.is_done and not is_running(member.out)
    return run.get("error") if failed else None


def _write_files(out: Path, results: dict[str, Any], more: str = "") -> None:
    """Write sweep.json, and sweep.md with more Markdown at its end."""
    write_file(out / RESULTS, json.dumps(results, indent=1, allow_nan=False) + "\n")
    write_file(out / TABLE, markdown(results) + more)


def _run(member: Member, error: str | None) -> dict[str, Any]:
    """State, place in the grid and metrics of a run, of its folder."""
    attempts = read_attempts(member.out)
    last = attempts[-1] if attempts else {}
    if error:
        state = FAILED
    elif is_running(member.out):
        state = "training"
    elif member.is_trained:
        state = FINISHED if member.is_evaluated else "not evaluated"
    else:
        state, error = last.get("ended", "not started"), last.get("error")
        if state == FINISHED:  # at fewer steps than the sweep asks for now, or its pipeline is gone
            state = "not finished"
    return {
        "state": state,
        "step": last.get("step", 0),
        "num_steps": member.num_steps,
        "arm": member.arm,
        "group": member.group,
        "point": member.point,
        "error": error,
        "metrics": {key: value for key, value in _metrics(member).items() if math.isfinite(value)},
    }


def _metrics(member: Member) -> dict[str, float]:
    """Figures by name: of training by their key, of a suite as suite/group/metric."""
    found: dict[str, float] = {}
    lines = read_metrics(member.out) if (member.out / METRICS).is_file() else []
    for line in lines:
        found |= {key: value for key, value in line.items() if TRAINING.fullmatch(key) and value is not None}
    report = read_json(member.report, "delete it") if member.report.is_file() else {"suites": {}}
    try:
        for suite, result in report["suites"].items():
            for group, figures in result["metrics"].items():
                found |= {f"{suite}/{group}/{name}": value for name, value in figures.items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{member.report}: is not a report of `megafusion evaluate`; delete it") from error
    return found


def _spread(runs: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """By metric: mean, sample standard deviation (0 of one run) and number of a group's runs that have it."""
    found = {}
    for name in dict.fromkeys(key for run in runs for key in run):
        values = [run[name] for run in runs if name in run]
        spread = stdev(values) if len(values) > 1 else 0.0
        found[name] = {"mean": fmean(values), "std": spread, "runs": len(values)}
    return found


def markdown(results: dict[str, Any]) -> str:
    """A table of the runs, and one with a line for each metric and a column for each group."""
    lines = ["# Sweep", "", "| run | state | step |", "|---|---|---|"]
    for name, run in results["runs"].items():
        error = f": {' '.join(run['error'].split())}" if run.get("error") else ""
        state = f"{run['state']}{error}".replace("|", "\\|")
        lines.append(f"| {name} | {state} | {run['step']:,} of {run['num_steps']:,} |")
    groups = results["groups"]
    rows = list(dict.fromkeys(metric for each in groups.values() for metric in each))
    lines += ["", "Mean ± standard deviation over seeds (number of runs).", ""]
    lines += [
        f"| metric | {' | '.join(name or 'all' for name in groups)} |",
        "|---" * (1 + len(groups)) + "|",
    ]
    for metric in rows:
        lines.append(f"| {metric} | {' | '.join(_cell(each.get(metric)) for each in groups.values())} |")
    return "\n".join(lines) + "\n"


def _cell(figures: dict[str, float] | None) -> str:
    if figures is None:
        return ""
    spread = f" ± {figures['std']:.2g}" if figures["runs"] > 1 else ""
    return f"{figures['mean']:.5g}{spread} ({figures['runs']})"
