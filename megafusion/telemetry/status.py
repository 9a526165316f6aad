"""`megafusion status RUN`: one screen about a run, read from its folder while it trains and after."""

import socket
import time
from datetime import timedelta
from pathlib import Path

import yaml
from rich.console import Console
from rich.filesize import decimal
from rich.progress_bar import ProgressBar
from rich.table import Table

from megafusion.checkpoint.folder import DAMAGED, complete_checkpoints, read_manifest, step_of
from megafusion.errors import UserError
from megafusion.resilience.attempts import STEP, is_running, read_attempts
from megafusion.telemetry.metrics_file import METRICS, read_metrics

LAUNCHED = ("launch", "logs")
"""Folders that a launcher writes before the first attempt."""
SILENCE_SECONDS = 60.0
"""A run on another machine counts as silent if its step is older than this, and than three steps take."""

SKIPPED = {
    "skipped_steps": "steps",
    "rollbacks": "rollbacks",
    "loss_spikes": "loss spikes",
    "documents_skipped": "documents",
    "save_errors": "failed saves",
    "saves_skipped": "skipped saves",
}
"""Words for the counts in a line of metrics."""


def show_status(run: Path, console: Console | None = None) -> None:
    """Print the screen. Raises UserError for a folder that is not a run's."""
    config, console = run / "config.yaml", console or Console()
    if not config.is_file():
        if not any((run / name).is_dir() for name in LAUNCHED):
            raise UserError(f"{run}: not a run folder (no config.yaml); `megafusion train` makes one")
        console.print(f"{run}: not started yet: in the queue, or starting; see {run / 'logs'}")
        return
    lines = read_metrics(run) if (run / METRICS).is_file() else []
    attempts = read_attempts(run)
    changed = attempts[-1].get("changed", {}) if attempts else {}
    num_steps = yaml.safe_load(config.read_text())["train"]["num_steps"]
    num_steps = changed.get("train.num_steps", [num_steps])[-1]
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column()
    last = lines[-1] if lines else {}
    state, step = _state(run, attempts, last)
    table.add_row("run", f"{run}: {state}")
    table.add_row("progress", f"step {step:,} of {num_steps:,} ({step / num_steps:.1%})")
    table.add_row("", ProgressBar(total=num_steps, completed=step, width=40))
    for name, text in _figures(last, num_steps - step):
        table.add_row(name, text)
    if validated := [line for line in lines if "validation_loss" in line]:
        table.add_row("validation", _validation(validated))
    table.add_row("last checkpoint", _checkpoint(run))
    table.add_row("skipped", ", ".join(f"{last.get(key, 0):,} {name}" for key, name in SKIPPED.items()))
    ends = [attempt["ended"] for attempt in attempts if not attempt.get("is_open")]
    counts = ", ".join(f"{ends.count(end)} {end}" for end in dict.fromkeys(ends))
    table.add_row("attempts", f"{len(attempts)}" + (f" (ended: {counts})" if counts else ""))
    console.print(table)


def _state(run: Path, attempts: list[dict], last: dict) -> tuple[str, int]:
    """State of the run, and the last step that is done or running."""
    recorded = last.get("step", 0)
    if not attempts:
        return "has not started training", recorded
    latest = attempts[-1]
    step = max(recorded, latest["step"])
    if not latest.get("is_open"):
        return _ended(latest), step
    try:
        age = time.time() - (run / STEP).stat().st_mtime
    except OSError:
        age = time.time() - latest["time"]
    began = f"step {step:,} began {_duration(age)} ago"
    if latest["host"] == socket.gethostname():
        if is_running(run):
            return f"training, {began}", step
        return f"its process is gone, {began}; start it again to resume", step
    limit = max(SILENCE_SECONDS, 3 * last.get("step_seconds", 0))
    return f"training on {latest['host']}, {began}" if age < limit else f"silent, {began}", step


def _ended(attempt: dict) -> str:
    more = {"preempted": " (start it again to resume)", "stopped": " by --stop-after"}
    text = attempt["ended"] + more.get(attempt["ended"], "")
    return f"{text} at step {attempt['step']:,}" + (f": {attempt['error']}" if "error" in attempt else "")


def _figures(last: dict, steps_left: int) -> list[tuple[str, str]]:
    """Rows of the table for the last line of metrics."""
    if not last:
        return [("losses", "no metrics yet")]
    seconds = last["step_seconds"]
    mfu = f"{last['mfu']:.1%}" if "mfu" in last else "unknown (no peak FLOP/s for this chip and precision)"
    device = last["device_memory_bytes"]
    memory = f"host {decimal(last['host_memory_bytes'])}" + (f", device {decimal(device)}" if device else "")
    straggler = f"rank {last['slowest_rank']}: {last['slowest_ratio']:.2f} times the median of its stage"
    return [
        ("losses", f"text {last['text_loss']:.4f}, image {last['image_loss']:.4f} (step {last['step']:,})"),
        ("gradient norm", f"{last['gradient_norm']:.3g}, learning rate {last['learning_rate']:.3g}"),
        ("speed", f"{last['tokens_per_second']:,.0f} tokens/s, {seconds:.3g} s per step"),
        ("waiting for data", f"{last['data_seconds'] / seconds:.1%} of a step, on the slowest rank"),
        ("MFU", mfu),
        ("slowest rank", straggler),
        ("memory", f"{memory}, peak of any rank"),
        (
            "training FLOPs",
            f"{last['flops']:.4g}" if "flops" in last else "not counted by an earlier version",
        ),
        ("training time", _duration(last["seconds"])),
        ("time left", _duration(steps_left * seconds) if steps_left > 0 else "none"),
    ]


def _validation(lines: list[dict]) -> str:
    """The latest measurement, and the best one."""
    last, best = lines[-1], min(lines, key=lambda line: line["validation_loss"])
    parts = {"text": "validation_text_loss", "image": "validation_image_loss"}
    losses = ", ".join(f"{name} {last[key]:.4f}" for name, key in parts.items() if key in last)
    return f"{losses} (step {last['step']:,}); lowest total at step {best['step']:,}"


def _checkpoint(run: Path) -> str:
    found = complete_checkpoints(run / "checkpoints")
    damaged = len(list((run / "checkpoints").glob(f"*{DAMAGED}")))
    text = "none"
    if found:
        size = sum(entry["bytes"] for entry in read_manifest(found[-1]).values())
        age = time.time() - found[-1].stat().st_mtime
        text = f"step {step_of(found[-1]):,}, {_duration(age)} ago, {decimal(size)}; {len(found)} kept"
    return text + (f", {damaged} damaged and quarantined" if damaged else "")


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(max(0.0, seconds))))
