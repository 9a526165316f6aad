"""`megafusion status`: a run folder on one screen, while the run trains and after."""

import json
import time
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from megafusion.checkpoint.folder import complete_checkpoints, quarantine
from megafusion.cli import app
from megafusion.config import parse_config
from megafusion.errors import UserError
from megafusion.resilience.attempts import ATTEMPTS, Attempts
from megafusion.telemetry.status import show_status
from megafusion.train.config import RunConfig
from megafusion.train.loop import train


def shown(run: Path) -> str:
    console = Console(width=160, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    show_status(run, console)
    return console.export_text()


@pytest.fixture
def run(run_values) -> Path:
    """A run that stopped after four of six steps."""
    train(parse_config(RunConfig, run_values, "test"), stop_after=4)
    return Path(run_values["out"])


def test_a_run_that_was_stopped(run):
    text = shown(run)
    assert "stopped by --stop-after at step 4" in text
    assert "step 4 of 6 (66.7%)" in text
    assert "tokens/s" in text
    assert "unknown (no peak FLOP/s for this chip and precision)" in text
    assert "step 4, 0:00:0" in text
    assert "2 kept" in text
    assert "0 steps, 0 rollbacks" in text
    assert " 1 (ended: 1 stopped)" in text
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"text {line['text_loss']:.4f}, image {line['image_loss']:.4f} (step 4)" in text


def test_a_running_run_and_one_whose_process_is_gone(run):
    attempts = Attempts(run)
    attempts.claim()
    attempts.begin(1, 4)
    attempts.resumed(4)
    attempts.at(5)
    assert "training, step 5 began 0:00:0" in shown(run)
    assert "step 5 of 6" in shown(run)
    attempts._release()  # as the system does for a process that dies
    assert "its process is gone, step 5 began" in shown(run)
    record = json.loads((run / ATTEMPTS).read_text())
    record[-1] |= {"host": "elsewhere", "time": time.time()}
    (run / ATTEMPTS).write_text(json.dumps(record))
    assert "training on elsewhere, step 5 began" in shown(run)


def test_a_run_that_is_launched_and_not_started(tmp_path):
    (tmp_path / "launch").mkdir()
    assert "not started yet" in shown(tmp_path)


def test_faults_are_shown(run, run_values):
    quarantine(complete_checkpoints(run / "checkpoints")[-1])
    assert "1 damaged and quarantined" in shown(run)
    attempts = Attempts(run)
    attempts.claim()
    attempts.begin(1, 4)
    attempts.resumed(3)
    attempts.at(5)
    attempts.end("crashed", "KeyError: 'x'")
    text = shown(run)
    assert "crashed at step 5: KeyError: 'x'" in text
    assert " 2 (ended: 1 stopped, 1 crashed)" in text


def test_a_finished_run_and_the_command(run, run_values):
    train(parse_config(RunConfig, run_values, "test"))
    answer = CliRunner().invoke(app, ["status", str(run)])
    assert answer.exit_code == 0
    assert "finished at step 6" in " ".join(answer.output.split())


def test_a_folder_that_is_not_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"not a run folder \(no config\.yaml\)"):
        show_status(tmp_path)


def test_a_run_that_has_not_trained_yet(run):
    for path in (run / "metrics.jsonl", run / ATTEMPTS, run / "step"):
        path.unlink()
    assert "has not started training" in shown(run)
    assert "no metrics yet" in shown(run)
