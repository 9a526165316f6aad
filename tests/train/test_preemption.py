"""Asked to stop, all ranks save at the same step and end, and the run goes on as if nothing had been."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch.distributed as dist
import yaml

from megafusion.checkpoint.folder import complete_checkpoints, verify_checkpoint
from megafusion.config import parse_config
from megafusion.engine.engine import Engine
from megafusion.resilience.attempts import read_attempts
from megafusion.resilience.signals import StopSignals
from megafusion.telemetry.metrics_file import read_metrics
from megafusion.train import loop as run_module
from megafusion.train.config import RunConfig
from megafusion.train.loop import train
from tests.support.marks import full
from tests.support.workers import run_workers


def ask(values: dict, rank: int, step: int | None) -> str:
    """Train; one rank alone is asked to stop while it is in a step."""
    signals, rate = StopSignals(), run_module.learning_rate

    def asked(done: int, *arguments) -> float:
        if dist.get_rank() == rank and done + 1 == step:
            signals.requested = True
        return rate(done, *arguments)

    run_module.learning_rate = asked
    return train(parse_config(RunConfig, values, "test"), None, signals)


def losses(run: Path) -> list[tuple]:
    return [(line["step"], line["text_loss"], line["image_loss"]) for line in read_metrics(run)]


# The last of two pipeline ranks stands for the last of four ranks.
@pytest.mark.parametrize(
    ("world", "parallel"),
    full((2, {"pipeline": 2}), (2, {"pipeline": 2, "virtual_stages": 2}), (4, {"pipeline": 2, "tensor": 2})),
)
def test_one_rank_of_a_pipeline_is_asked_and_all_save_after_the_next_step(
    run_values, tmp_path, world, parallel
):
    run_values["parallel"] = parallel
    run_values["model"]["num_layers"] = 2 * parallel.get("virtual_stages", 1)
    whole = run_values | {"out": str(tmp_path / "whole")}
    assert run_workers(ask, world, whole, 0, None) == ["finished"] * world
    assert run_workers(ask, world, run_values, world - 1, 4) == ["preempted"] * world
    run = Path(run_values["out"])
    assert [p.name for p in complete_checkpoints(run / "checkpoints")] == ["step-00000003", "step-00000005"]
    assert run_workers(ask, world, run_values, 0, None) == ["finished"] * world
    assert losses(run) == losses(tmp_path / "whole")
    assert [attempt["ended"] for attempt in read_attempts(run)] == ["preempted", "finished"]


def test_batches_left_out_before_the_end_are_not_read_again(run_values, monkeypatch):
    """Asked to stop amid bad steps, right after a checkpoint: that is saved again, with the data's place."""
    run_values["checkpoint"] = {"every": 1}
    bad = range(3, 5)
    signals = StopSignals()

    def asked(done: int, *arguments) -> float:
        signals.requested |= number[0] == bad[0] + 1  # the rate is asked for after the backward pass
        return rate(done, *arguments)

    step, number, rate = Engine.forward_backward, [0], run_module.learning_rate

    def hurt_step(engine: Engine, *arguments) -> object:
        parameter = next(engine.stage.parameters())
        number[0] += 1
        hook = parameter.register_hook(lambda g: g * float("nan")) if number[0] - 1 in bad else None
        losses = step(engine, *arguments)
        if hook:
            hook.remove()
        return losses

    monkeypatch.setattr(Engine, "forward_backward", hurt_step)
    monkeypatch.setattr(run_module, "learning_rate", asked)
    assert train(parse_config(RunConfig, run_values, "test"), None, signals) == "preempted"
    newest = complete_checkpoints(Path(run_values["out"]) / "checkpoints")[-1]
    verify_checkpoint(newest)
    state = json.loads((newest / "state.json").read_text())
    assert (state["step"], state["health"]["skipped_steps"], state["data"]["batch_number"]) == (3, 2, 5)
    assert not list(newest.parent.glob("*.partial"))
    assert train(parse_config(RunConfig, run_values, "test")) == "finished"


def test_the_command_ends_with_75_however_often_it_is_asked(run_values, tmp_path):
    run_values["train"]["num_steps"] = 100_000
    run_values["checkpoint"] = {"every": 100_000}
    config, run = tmp_path / "config.yaml", Path(run_values["out"])
    config.write_text(yaml.safe_dump(run_values))
    command = [sys.executable, "-m", "megafusion.cli", "train", str(config)]
    as_in_a_terminal = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(
        command,
        env=os.environ | {"MASTER_ADDR": "localhost"},  # as some clusters set it: the process runs alone
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=as_in_a_terminal,
    )
    deadline = time.monotonic() + 120
    while not read_attempts(run) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(0.5)
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
        os.kill(process.pid, number)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 75, said
    assert "Ctrl-C again exits now" in said
    assert "asked to stop: a checkpoint of step" in " ".join(said.split())
    (checkpoint,) = complete_checkpoints(run / "checkpoints")
    (attempt,) = read_attempts(run)
    assert (attempt["ended"], f"step-{attempt['step']:08d}") == ("preempted", checkpoint.name)
