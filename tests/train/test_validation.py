"""Losses on held-out documents: the same at every topology, and without a trace in the training."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from megafusion.config import parse_config
from megafusion.engine.engine import Engine
from megafusion.errors import UserError
from megafusion.resilience.signals import StopSignals
from megafusion.telemetry.metrics_file import read_metrics
from megafusion.telemetry.status import show_status
from megafusion.train.config import RunConfig
from megafusion.train.loop import train
from megafusion.train.run_folder import absolute_paths
from megafusion.train.validation import _num_bytes
from tests.support.marks import full
from tests.support.workers import run_workers


@pytest.fixture
def validated(run_values) -> dict:
    """A run of six steps that is measured at every second one."""
    sources = run_values["data"]["sources"]
    run_values["data"]["validation"] = {"sources": sources, "every": 2, "num_batches": 2}
    run_values["telemetry"] = {"log_every": 1}
    return run_values


def start(values: dict, out: Path, stop_after: int | None = None) -> list[dict]:
    train(parse_config(RunConfig, values | {"out": str(out)}, "test"), stop_after)
    return read_metrics(out)


def losses(lines: list[dict]) -> list[dict]:
    return [{key: line[key] for key in line if key.startswith("validation_")} for line in lines]


TRAINING = ("step", "text_loss", "image_loss", "gradient_norm", "learning_rate")


def course(lines: list[dict]) -> list[tuple]:
    return [tuple(line[name] for name in TRAINING) for line in lines]


def test_it_changes_no_bit_of_the_training(validated, tmp_path):
    measured = start(validated, tmp_path / "measured")
    del validated["data"]["validation"]
    assert course(measured) == course(start(validated, tmp_path / "plain"))
    assert [line["step"] for line in measured if "validation_loss" in line] == [2, 4, 6]


def test_it_may_change_when_a_run_resumes(validated, tmp_path, monkeypatch):
    """And its paths are found from any directory."""
    start(validated, tmp_path / "run", stop_after=3)
    data = validated["data"]
    monkeypatch.chdir(Path(data["sources"]["pairs"]["path"]).parent)
    data["validation"] = {"sources": {"text": {"path": "text"}}, "every": 3, "num_batches": 1}
    lines = start(validated, tmp_path / "run")
    assert [line["step"] for line in lines if "validation_loss" in line] == [2, 3, 6]
    assert "validation_image_loss" not in lines[-1]
    config = parse_config(RunConfig, validated, "test")
    (source,) = absolute_paths(config).data.validation.sources.values()
    assert source.path == str(Path("text").absolute())


def test_a_resumed_run_measures_the_same(validated, tmp_path):
    whole = start(validated, tmp_path / "whole")
    start(validated, tmp_path / "parts", stop_after=3)
    parts = start(validated, tmp_path / "parts")
    assert losses(parts)[3:] == losses(whole)[3:]
    assert parts[2]["validation_loss"]  # the last step of the attempt
    assert losses(parts)[1] == losses(whole)[1]


def test_the_total_and_the_ranges_of_time_add_up(validated, tmp_path):
    validated["objective"] = {"image_weight": 5.0}
    *_, last = start(validated, tmp_path / "run")
    total = last["validation_text_loss"] + 5 * last["validation_image_loss"]
    assert last["validation_loss"] == pytest.approx(total)
    ranges = [last[f"validation_image_loss_t{n}"] for n in range(10) if f"validation_image_loss_t{n}" in last]
    assert min(ranges) < last["validation_image_loss"] < max(ranges)
    assert 1 < last["validation_text_loss"] / last["validation_text_loss_per_byte"] < 6


def test_status_shows_the_latest_and_the_best(validated, tmp_path):
    lines = start(validated, tmp_path / "run")
    console = Console(record=True, width=200)
    show_status(tmp_path / "run", console)
    shown = " ".join(console.export_text().split())
    best = min(lines, key=lambda line: line.get("validation_loss", 1e9))
    text, image = lines[-1]["validation_text_loss"], lines[-1]["validation_image_loss"]
    assert f"text {text:.4f}, image {image:.4f} (step 6); lowest total at step {best['step']}" in shown


def test_the_best_checkpoint_is_kept(validated, tmp_path):
    """A rate that destroys what was learnt: the first checkpoints are better than the last."""
    validated["optimizer"] = {"learning_rate": 1.0, "num_warmup_steps": 6, "gradient_clip": 0.0}
    validated["checkpoint"] = {"every": 2, "keep_last": 1, "keep_best": True}
    run = tmp_path / "run"
    lines = start(validated, run)
    measured = {line["step"]: line["validation_loss"] for line in lines if "validation_loss" in line}
    best = min(measured, key=measured.__getitem__)
    assert best != 6
    kept = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert kept == [f"step-{best:08d}", "step-00000006"]
    states = [json.loads((run / "checkpoints" / name / "state.json").read_text()) for name in kept]
    assert [state["validation_loss"] for state in states] == [measured[best], measured[6]]


def test_a_step_that_is_saved_again_keeps_its_validation(validated, tmp_path, monkeypatch):
    """A resumed run, asked to stop after a bad step, saves the step of its checkpoint with more data read."""
    validated["checkpoint"] = {"every": 2, "keep_best": True}
    run, step, signals = tmp_path / "run", Engine.forward_backward, StopSignals()
    start(validated, run, stop_after=2)
    (before,) = [path / "state.json" for path in (run / "checkpoints").iterdir()]
    state = json.loads(before.read_text())

    def bad_step(engine: Engine, *arguments) -> object:
        hook = next(engine.stage.parameters()).register_hook(lambda g: g * float("nan"))
        signals.requested = True
        losses = step(engine, *arguments)
        hook.remove()
        return losses

    monkeypatch.setattr(Engine, "forward_backward", bad_step)
    assert train(parse_config(RunConfig, validated | {"out": str(run)}, "test"), None, signals) == "preempted"
    again = json.loads(before.read_text())
    assert (again["step"], again["validation_loss"]) == (2, state["validation_loss"])
    assert again["data"]["batch_number"] > state["data"]["batch_number"]


@pytest.mark.parametrize(
    ("world", "parallel"),
    [
        (2, {"pipeline": 2}),
        *full(
            (2, {"tensor": 2, "sequence": True}),
            (2, {"zero_stage": 3}),
            (2, {"ulysses": 2}),
            (4, {"tensor": 2, "pipeline": 2}),
            (2, {"pipeline": 2, "virtual_stages": 2}),
        ),
    ],
)
def test_any_topology_measures_and_trains_as_one_device(validated, tmp_path, world, parallel):
    validated["model"]["num_layers"] = 2 * parallel.get("virtual_stages", 1)
    alone = start(validated, tmp_path / "alone")
    validated["parallel"] = parallel
    together = run_workers(start, world, validated, tmp_path / "together")[0]
    for one, other in zip(alone, together, strict=True):
        (expected,), (found,) = losses([one]), losses([other])
        assert found == pytest.approx(expected, rel=2e-5)
    del validated["data"]["validation"]
    plain = run_workers(start, world, validated, tmp_path / "plain")[0]
    assert course(plain) == course(together)


def test_bytes_are_those_of_the_text(tokenizer):
    texts = ["ten bytes, café", "two"]
    ids = [torch.tensor(tokenizer.encode(text)) for text in texts]
    labels, positions = torch.full((2, 64), -100), torch.arange(64).repeat(2, 1)
    labels[1, 3 : 3 + len(ids[0])], labels[1, 40 : 40 + len(ids[1])] = ids
    positions[1, 30:] -= 30
    batch = SimpleNamespace(labels=labels, positions=positions)
    assert _num_bytes(batch, tokenizer) == len("".join(texts).encode())


def test_what_does_not_fit_is_refused_before_anything_is_written(validated, tmp_path):
    data, out = validated["data"], tmp_path / "run"
    places = {"few": data["sources"]["pairs"]["path"], "none": str(tmp_path / "none")}
    few, none = ({name: {"path": path}} for name, path in places.items())
    changes = [
        ({"telemetry": {"log_every": 4}}, r"validation\.every 2 is not a multiple of telemetry\.log_every 4"),
        (
            {"checkpoint": {"every": 3, "keep_best": True}},
            r"keep_best needs data\.validation, and .* 3 to be",
        ),
        ({"data": data | {"validation": {"sources": none, "every": 1}}}, r"none: not a folder of shards"),
        (
            {
                "data": data
                | {"sources": {"text": data["sources"]["text"]}, "num_streams": 24}
                | {"validation": {"sources": few, "every": 1}},
                "train": validated["train"] | {"global_batch_size": 24},
            },
            r"data\.validation\.sources\.few: .* holds 22 documents, fewer than 24 logical streams",
        ),
    ]
    for change, message in changes:
        with pytest.raises(UserError, match=message):
            start(validated | change, out)
        assert not out.exists()
