"""A sweep of small runs."""

import json
from pathlib import Path

import pytest
import yaml

from megafusion.sweep.members import Member


def train(member: Member, *steps: int, **metrics: float) -> None:
    """Files of a member that has finished at each of some numbers of steps, its own by default."""
    (member.out / "pipeline").mkdir(parents=True)
    (member.out / "config.yaml").write_text(member.config)
    attempts = [{"ended": "finished", "step": step} for step in steps or (member.num_steps,)]
    (member.out / "starts.json").write_text(json.dumps(attempts))
    line = {"step": attempts[-1]["step"]} | metrics
    (member.out / "metrics.jsonl").write_text(json.dumps(line) + "\n")


def evaluate(member: Member, value: float) -> None:
    """The report that `megafusion evaluate` writes of a member."""
    suites = {"perplexity": {"metrics": {"all": {"perplexity": value}}}}
    member.results.mkdir(parents=True)
    member.report.write_text(json.dumps({"suites": suites}))


@pytest.fixture
def sweep_file(run_values, tmp_path) -> Path:
    """Two arms with one seed, of which nothing is trained yet."""
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(run_values | {"telemetry": {"trackers": []}}))
    values = {
        "base": str(tmp_path / "config.yaml"),
        "out": str(tmp_path / "sweep"),
        "overrides": ["telemetry.log_every=1", "data.num_workers=0"],
        "runs": {"plain": [], "causal": ["model.num_layers=1"]},
        "grid": {"seed": [0]},
    }
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


@pytest.fixture
def texts(tmp_path) -> Path:
    """Three documents of held-out text."""
    path = tmp_path / "held-out.txt"
    path.write_text("a red apple\na ghost that is white\nwater\n")
    return path
