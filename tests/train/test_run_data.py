"""A run and its data: workers change nothing but the time, and metrics say what rows hold."""

import os

import psutil
import pytest

from megafusion.config import parse_config
from megafusion.errors import UserError
from megafusion.telemetry.metrics_file import read_metrics
from megafusion.train.config import RunConfig
from megafusion.train.loop import train


def start(values: dict, stop_after: int | None = None) -> list[dict]:
    config = parse_config(RunConfig, values, "test")
    train(config, stop_after)
    return read_metrics(config.out)


def children() -> list[psutil.Process]:
    """Of this process, without the servers that stay: of forks, and of what they share."""
    stay = ("multiprocessing.forkserver", "multiprocessing.resource_tracker")
    found = psutil.Process(os.getpid()).children()
    return [child for child in found if not any(name in " ".join(child.cmdline()) for name in stay)]


def test_workers_give_the_same_losses_across_a_restart_and_end_with_the_run(run_values, tmp_path):
    plain = start(run_values)
    before = children()
    ahead = {**run_values, "out": str(tmp_path / "ahead")}
    ahead["data"] = {**run_values["data"], "num_workers": 2, "prefetch": 3}
    start(ahead, stop_after=3)
    ahead["data"] = {**ahead["data"], "num_workers": 1}  # is free to change
    found = start(ahead)
    names = ("step", "text_loss", "image_loss", "fill", "padding", "share/pairs", "share/text")
    assert [[line[n] for n in names] for line in found] == [[line[n] for n in names] for line in plain]
    assert children() == before


def test_metrics_say_what_rows_hold(run_values):
    for line in start(run_values):
        assert 0.9 < line["fill"] <= 1
        assert line["padding"] == pytest.approx(1 - line["fill"])
        assert line["share/pairs"] + line["share/text"] == pytest.approx(1)
        assert line["documents_skipped"] == 0


def test_a_data_state_of_an_older_format_is_refused_when_resuming(run_values, monkeypatch):
    from megafusion.data import loader

    monkeypatch.setattr(loader, "FORMAT", 1)
    start(run_values, stop_after=3)
    monkeypatch.undo()
    with pytest.raises(UserError, match="data state has format 1, and this version reads 2"):
        start(run_values)
