"""Trackers of a run's metrics."""

import importlib.util
import re
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megafusion.errors import UserError
from megafusion.telemetry.metrics_file import read_metrics
from megafusion.telemetry.trackers import TensorBoard, prometheus_text
from tests.support.runs import start


def test_prometheus_has_the_last_line_and_tensorboard_is_off_unless_configured(run_values):
    run_values["telemetry"]["trackers"] = ["prometheus"]
    run = start(run_values)
    text = (run / "metrics.prom").read_text()
    # One comment and one sample per metric, as in the text format.
    pattern = r'(# TYPE (megafusion_[a-zA-Z0-9_]+) gauge\n\2\{run="run"\} [0-9.e+-]+\n)+'
    assert re.fullmatch(pattern, text), text
    values = dict(re.findall(r"^megafusion_(\w+)\{.*\} (\S+)$", text, re.MULTILINE))
    last = read_metrics(run)[-1]
    assert float(values["step"]) == 6
    assert float(values["text_loss"]) == last["text_loss"]
    assert float(values["share_pairs"]) == last["share/pairs"]
    assert float(values["skipped_steps"]) == 0
    assert not (run / "tensorboard").exists()


def test_tensorboard_keeps_the_step_that_a_run_resumes_after(tmp_path):
    for first_step, steps in ((0, (10, 20, 30)), (20, (30, 40))):
        tracker = TensorBoard(tmp_path, first_step)
        for step in steps:
            tracker.log(step, {"loss": step + first_step})
        tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(each.step, each.value) for each in events.Scalars("loss")] == [
        (10, 10),
        (20, 20),
        (30, 50),
        (40, 60),
    ]


def test_a_name_in_a_label_is_escaped():
    assert prometheus_text('a"b\\c\nd', {"x/y": 1}).splitlines()[1] == (
        r'megafusion_x_y{run="a\"b\\c\nd"} 1.0'
    )


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_wandb_is_refused_at_start_if_not_installed(run_values):
    run_values["telemetry"]["trackers"] = ["wandb"]
    with pytest.raises(UserError, match=r"telemetry\.trackers: wandb is not installed"):
        start(run_values)
    assert not Path(run_values["out"]).exists()


def test_wandb_offline(run_values, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run_values["telemetry"] |= {"trackers": ["wandb"], "wandb_project": "test"}
    run = start(run_values)
    assert list(run.glob("wandb/offline-run-*/*.wandb"))


def test_a_wandb_project_without_wandb_is_refused(run_values):
    run_values["telemetry"]["wandb_project"] = "mine"
    with pytest.raises(UserError, match=r"telemetry\.trackers \['tensorboard'\] does not contain wandb"):
        start(run_values)
