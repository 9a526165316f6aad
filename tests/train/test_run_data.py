"""A run and its data: workers change nothing but the time, and metrics say what rows hold."""

import os
from types import SimpleNamespace

import psutil
import pytest

from megafusion.config import parse_config
from megafusion.engine.process_group import start_process_group
from megafusion.errors import UserError
from megafusion.telemetry.metrics_file import read_metrics
from megafusion.train.build import build_components
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


@pytest.mark.parametrize(
    ("adapter", "pipeline", "drops"), [("unet", 1, True), ("unet", 2, False), ("linear", 1, False)]
)
def test_a_unet_gets_no_slots_that_no_row_of_its_micro_batch_uses(run_values, adapter, pipeline, drops):
    """Slots are dropped from the end; with a linear adapter and between stages all stay."""
    run_values["model"] |= {"adapter": adapter, "unet_channels": 8}
    run_values["data"]["images_per_row"] = 8
    config = parse_config(RunConfig, run_values, "test")
    mesh = SimpleNamespace(size={"pipeline": pipeline, "data": 1}.__getitem__, rank=lambda axis: 0)
    start_process_group()
    loader = build_components(config, mesh).loader
    kept = set()
    for batch in (batch for _ in range(6) for batch in loader.next()):
        used = (batch.image_start >= 0).sum(1).max()
        kept.add(batch.t.shape[1])
        assert batch.t.shape[1] == (2 * max(1, -(-used // 2)) if drops else 8)
        assert batch.latents.shape[:2] == batch.t.shape
    assert (len(kept) > 1) == drops


def test_a_data_state_of_an_older_format_is_refused_when_resuming(run_values, monkeypatch):
    from megafusion.data import loader

    monkeypatch.setattr(loader, "FORMAT", 1)
    start(run_values, stop_after=3)
    monkeypatch.undo()
    with pytest.raises(UserError, match="data state has format 1, and this version reads 2"):
        start(run_values)
