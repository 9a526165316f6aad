"""Bad steps of a run: NaN gradients, loss spikes, crash loops."""

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from megafusion.checkpoint.folder import complete_checkpoints
from megafusion.cli import app
from megafusion.engine.engine import Engine
from megafusion.errors import ExitStatus, UserError
from megafusion.objective.losses import Losses
from megafusion.telemetry.metrics_file import read_metrics
from megafusion.train import loop as run_module
from tests.support.runs import start


def raise_losses(monkeypatch, batch: int, by: float) -> None:
    """Report a larger total loss for one batch, with its gradients unchanged."""
    step, number = Engine.forward_backward, [0]

    def hurt(engine: Engine, *arguments) -> Losses:
        add, is_it = type(engine.consensus).add_losses, number[0] == batch
        number[0] += 1
        if is_it:
            engine.consensus.add_losses = lambda losses: add(
                engine.consensus, losses._replace(total=losses.total + by)
            )
        try:
            return step(engine, *arguments)
        finally:
            vars(engine.consensus).pop("add_losses", None)

    monkeypatch.setattr(Engine, "forward_backward", hurt)


@pytest.mark.parametrize(("action", "skipped"), [("warn", 0), ("skip", 1), ("off", None)])
def test_a_loss_spike(run_values, monkeypatch, capfd, action, skipped):
    run_values["train"]["num_steps"] = 40
    run_values["checkpoint"] = {"every": 20}
    run_values["telemetry"] = {"log_every": 10}
    run_values["resilience"] = {"spikes": action}
    raise_losses(monkeypatch, 36, 100.0)
    run = start(run_values)
    last = read_metrics(run)[-1]
    said = capfd.readouterr().err
    assert (last["skipped_steps"], last["loss_spikes"]) == (skipped or 0, action != "off")
    assert said.count("step 37: loss spike") == (action != "off")
    assert ("skipped on all ranks" in said) == (action == "skip")
    state = json.loads((complete_checkpoints(run / "checkpoints")[-1] / "state.json").read_text())
    assert state["data"]["batch_number"] == 40 + (skipped or 0)
    assert len(state["health"]["losses"]) == (40 if action != "off" else 0)


class Bug(Exception):
    pass


def test_a_crash_loop_is_refused(run_values, tmp_path, monkeypatch):
    """The first attempt makes a checkpoint, the next three do not; the fifth is refused."""
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run_values))
    rate = run_module.learning_rate

    def crash_after_four(step: int, *arguments) -> float:
        if step == 4:
            raise Bug("always here")
        return rate(step, *arguments)

    def error_of(*overrides: str) -> BaseException | None:
        return CliRunner().invoke(app, ["train", str(tmp_path / "run.yaml"), *overrides]).exception

    monkeypatch.setattr(run_module, "learning_rate", crash_after_four)
    assert [type(error_of()) for _ in range(4)] == [Bug] * 4
    refused = error_of()
    assert isinstance(refused, UserError)
    expected = "the last 3 attempts crashed without a checkpoint after step 3 (Bug: always here)"
    assert expected in str(refused)
    assert refused.exit_status == ExitStatus.FAILED
    monkeypatch.setattr(run_module, "learning_rate", rate)
    assert error_of("resilience.max_crashes=0") is None
    assert read_metrics(Path(run_values["out"]))[-1]["step"] == 6
