"""Runs in this process, and what they leave in their folders."""

import json
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from megafusion.checkpoint.folder import complete_checkpoints
from megafusion.config import parse_config
from megafusion.telemetry.metrics_file import read_metrics
from megafusion.train.config import RunConfig
from megafusion.train.loop import train


def parsed(values: dict) -> RunConfig:
    return parse_config(RunConfig, values, "test")


def start(values: dict, stop_after: int | None = None, **changes) -> Path:
    """Train or resume a run; its folder."""
    config = parsed(values | changes)
    train(config, stop_after)
    return config.out


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint."""
    stored = dcp.FileSystemReader(checkpoint / "tensors").read_metadata().state_dict_metadata
    found = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in stored.items()}
    dcp.load(found, checkpoint_id=checkpoint / "tensors", no_dist=True)
    return found


def losses(run: Path) -> list[tuple]:
    names = ("step", "text_loss", "image_loss", "gradient_norm", "learning_rate")
    return [tuple(line[name] for name in names) for line in read_metrics(run)]


def assert_same_run(a: Path, b: Path) -> None:
    assert losses(a) == losses(b)
    first, second = (
        tensors(complete_checkpoints(a / "checkpoints")[-1]),
        tensors(complete_checkpoints(b / "checkpoints")[-1]),
    )
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    states = [
        json.loads((complete_checkpoints(r / "checkpoints")[-1] / "state.json").read_text()) for r in (a, b)
    ]
    assert states[0]["data"] == states[1]["data"]


def assert_resumes(values: dict, again: Path, stop_after: int = 2) -> Path:
    """A run that stops once and resumes, in a second folder, is the uninterrupted one; that one's folder."""
    whole = start(values)
    start(values, stop_after, out=str(again))
    assert_same_run(whole, start(values, out=str(again)))
    return whole
