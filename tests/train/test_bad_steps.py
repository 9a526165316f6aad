"""A run with bad steps: counted, said, told apart from jumps of the loss; a crash loop stops."""

import json
from pathlib import Path

import pytest

from megafusion.checkpoint.folder import complete_checkpoints
from megafusion.config import parse_config
from megafusion.engine.engine import Engine
from megafusion.errors import UserError
from megafusion.objective.losses import Losses
from megafusion.telemetry.metrics import read_metrics
from megafusion.train import loop as run_module
from megafusion.train.config import RunConfig
from megafusion.train.loop import train


def start(values: dict) -> Path:
    config = parse_config(RunConfig, values, "test")
    train(config)
    return config.out


def raise_losses(monkeypatch, batch: int, by: float) -> None:
    """One batch's total loss is seen as larger; its gradients are as they are."""
    step, number = Engine.step, [0]

    def hurt(engine: Engine, *arguments) -> Losses:
        add, is_it = type(engine.consensus).add_share, number[0] == batch
        number[0] += 1
        if is_it:
            engine.consensus.add_share = lambda losses: add(
                engine.consensus, [losses[0], losses[1], losses[2] + by]
            )
        try:
            return step(engine, *arguments)
        finally:
            vars(engine.consensus).pop("add_share", None)

    monkeypatch.setattr(Engine, "step", hurt)


@pytest.mark.parametrize(("action", "skipped"), [("warn", 0), ("skip", 1), ("off", None)])
def test_a_loss_that_jumps(run_values, monkeypatch, capfd, action, skipped):
    run_values["train"] |= {"num_steps": 40, "log_every": 10}
    run_values["checkpoint"] = {"every": 20}
    run_values["health"] = {"spikes": action}
    raise_losses(monkeypatch, 36, 100.0)
    run = start(run_values)
    last = read_metrics(run)[-1]
    said = capfd.readouterr().err
    assert (last["skipped_steps"], last["loss_spikes"]) == (skipped or 0, action != "off")
    assert said.count("step 37: the loss jumps") == (action != "off")
    assert ("left out on all ranks" in said) == (action == "skip")
    state = json.loads((complete_checkpoints(run / "checkpoints")[-1] / "state.json").read_text())
    assert state["data"]["batch_number"] == 40 + (skipped or 0)
    assert len(state["health"]["losses"]) == (40 if action != "off" else 0)


class Bug(Exception):
    pass


def test_a_run_that_crashes_at_the_same_step_is_not_started_for_ever(run_values, monkeypatch):
    rate = run_module.learning_rate

    def crash_after_four(step: int, *arguments) -> float:
        if step == 4:
            raise Bug("always here")
        return rate(step, *arguments)

    monkeypatch.setattr(run_module, "learning_rate", crash_after_four)
    for _ in range(3):
        with pytest.raises(Bug):
            start(run_values)
    message = r"last 3 starts crashed at step 5 \(Bug: always here\)"
    with pytest.raises(UserError, match=message) as refused:
        start(run_values)
    assert refused.value.exit_status == 1
    monkeypatch.setattr(run_module, "learning_rate", rate)
    run_values["health"] = {"max_crashes": 0}
    assert read_metrics(start(run_values))[-1]["step"] == 6
