"""`megafusion status RUN`: one screen about a run, while it trains and after. Reads the run folder alone."""

import socket
import time
from datetime import timedelta
from pathlib import Path

import psutil
import yaml
from rich.console import Console
from rich.filesize import decimal
from rich.progress_bar import ProgressBar
from rich.table import Table

from megafusion.checkpoint.folder import DAMAGED, complete_checkpoints, read_manifest, step_of
from megafusion.errors import UserError
from megafusion.resilience.attempts import STEP, read_starts
from megafusion.telemetry.metrics_file import METRICS, read_metrics

LAUNCHED = ("launch", "logs")
"""What a launcher writes before a run begins."""
SILENCE_SECONDS = 60.0
"""A run on another machine whose step is so old, or three times as old as a step takes, says nothing."""


def show_status(run: Path, console: Console | None = None) -> None:
    """Print it. UserError where the folder holds no run."""
    config = run / "config.yaml"
    if not config.is_file() and any((run / name).is_dir() for name in LAUNCHED):
        (console or Console()).print(f"{run}: not begun yet: in the queue, or starting; see {run / 'logs'}")
        return
    if not config.is_file():
        raise UserError(f"{run}: no config.yaml, so no run folder; `megafusion train` makes one")
    num_steps = yaml.safe_load(config.read_text())["train"]["num_steps"]
    lines = read_metrics(run) if (run / METRICS).is_file() else []
    starts = read_starts(run)
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column()
    state, step = _state(run, starts, lines)
    table.add_row("run", f"{run}: {state}")
    table.add_row("progress", f"step {step:,} of {num_steps:,} ({step / num_steps:.1%})")
    table.add_row("", ProgressBar(total=num_steps, completed=step, width=40))
    last = lines[-1] if lines else {}
    for name, text in _figures(last, num_steps - step):
        table.add_row(name, text)
    table.add_row("last checkpoint", _checkpoint(run))
    table.add_row("left out", _left_out(last))
    table.add_row("starts", _starts(starts))
    (console or Console()).print(table)


def _state(run: Path, starts: list[dict], lines: list[dict]) -> tuple[str, int]:
    """In words, and the last step that is done or under way."""
    recorded = lines[-1]["step"] if lines else 0
    if not starts:
        return "has not started to train", recorded
    latest = starts[-1]
    if not latest.get("is_open"):
        return _ended(latest), max(recorded, latest["step"])
    step = max(recorded, latest["step"])
    try:
        quiet = time.time() - (run / STEP).stat().st_mtime
    except OSError:
        quiet = time.time() - latest["time"]
    moved = f"step {step:,} began {_duration(quiet)} ago"
    if latest["host"] == socket.gethostname():
        if _is_alive(latest["pid"], latest["time"]):
            return f"trains, {moved}", step
        return f"its process is gone, {moved}; start it again to go on", step
    patience = max(SILENCE_SECONDS, 3 * (lines[-1]["step_seconds"] if lines else 0))
    return f"trains on {latest['host']}, {moved}" if quiet < patience else f"silent, {moved}", step


def _is_alive(pid: int, since: float) -> bool:
    """Whether the process that recorded itself then still runs: numbers are used again."""
    try:
        process = psutil.Process(pid)
        return process.create_time() <= since + 1 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _ended(start: dict) -> str:
    words = {
        "finished": "is finished",
        "preempted": "was asked to stop, and has saved; start it again to go on",
        "stopped": "has come to --stop-after",
    }
    text = words.get(start["ended"], start["ended"])
    return f"{text} at step {start['step']:,}" + (f": {start['error']}" if "error" in start else "")


def _figures(last: dict, steps_left: int) -> list[tuple[str, str]]:
    """What the last line of metrics says."""
    if not last:
        return [("losses", "no line of metrics yet")]
    seconds = last["step_seconds"]
    mfu = f"{last['mfu']:.1%}" if "mfu" in last else "unknown (no peak known for this chip and precision)"
    device = last["device_memory_bytes"]
    memory = f"host {decimal(last['host_memory_bytes'])}" + (f", device {decimal(device)}" if device else "")
    straggler = f"rank {last['slowest_rank']} takes {last['slowest_ratio']:.2f} times its stage's median"
    return [
        ("losses", f"text {last['text_loss']:.4f}, image {last['image_loss']:.4f} (step {last['step']:,})"),
        ("gradient norm", f"{last['gradient_norm']:.3g}, learning rate {last['learning_rate']:.3g}"),
        ("speed", f"{last['tokens_per_second']:,.0f} tokens/s, {seconds:.3g} s a step"),
        ("waits for data", f"{last['data_seconds'] / seconds:.1%} of a step, on the rank that waits longest"),
        ("MFU", mfu),
        ("slowest rank", straggler),
        ("memory", f"{memory}, at most on a rank"),
        ("trained for", _duration(last["seconds"])),
        ("time left", _duration(steps_left * seconds) if steps_left > 0 else "none"),
    ]


def _checkpoint(run: Path) -> str:
    found = complete_checkpoints(run / "checkpoints")
    damaged = len(list((run / "checkpoints").glob(f"*{DAMAGED}")))
    text = "none"
    if found:
        size = sum(entry["bytes"] for entry in read_manifest(found[-1]).values())
        age = time.time() - found[-1].stat().st_mtime
        text = f"step {step_of(found[-1]):,}, {_duration(age)} ago, {decimal(size)}; {len(found)} kept"
    return text + (f", {damaged} damaged and set aside" if damaged else "")


def _left_out(last: dict) -> str:
    names = {
        "skipped_steps": "steps skipped",
        "rollbacks": "rollbacks",
        "loss_spikes": "loss spikes",
        "documents_skipped": "documents",
        "save_errors": "failed saves",
        "saves_skipped": "skipped saves",
    }
    return ", ".join(f"{last.get(key, 0):,} {name}" for key, name in names.items())


def _starts(starts: list[dict]) -> str:
    if not starts:
        return "none"
    ends = [start["ended"] for start in starts if not start.get("is_open")]
    counts = ", ".join(f"{ends.count(end)} {end}" for end in dict.fromkeys(ends))
    restarts = max(0, len(starts) - 1)
    return f"{restarts} restart{'' if restarts == 1 else 's'}" + (f" (ended: {counts})" if counts else "")


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(max(0.0, seconds))))
