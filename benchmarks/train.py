"""How long is a training step, where does the time go, and how much of the chip does it use?

    python benchmarks/train.py [CONFIG] [KEY=VALUE ...] [--rows data|mixed|text|pairs] [--json FILE]

The real engine on a run's own shards (--rows data), or on synthetic rows, for which no file is needed: mixed
(half the positions in captions with images), text, pairs. One process; seconds are medians over the steps.

MFU = FLOPs of a step / (seconds x the chip's peak), with the FLOPs of megafusion/telemetry/throughput.py: 3 x
those of the forward pass, in which the head counts text targets and attention visible pairs of query and key.
Recomputation is not counted, nor are the masked pairs that dense attention computes.
"""

import argparse
import json
import platform
import statistics
import time
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from synthetic import SyntheticRows

from megafusion.config import load_config
from megafusion.engine.ema import Ema
from megafusion.engine.engine import Engine
from megafusion.engine.process_group import start_process_group
from megafusion.model.weights import Weight
from megafusion.parallel import parallelize
from megafusion.parallel.mesh import make_mesh
from megafusion.sequence.packing import PackedBatch, collate, with_counts
from megafusion.storage import write_file
from megafusion.telemetry.throughput import Work, peak_flops, step_flops
from megafusion.train.build import build_components, build_engine
from megafusion.train.config import RunConfig
from megafusion.train.loop import train_step

PHASES = ("data", "forward", "backward", "optimizer")
RATE = 1e-4
NUM_SYNTHETIC_STEPS = 2
"""Batches that synthetic steps take in turns, made before the clock starts."""


class Rows:
    """The micro-batches of a step: the run's own, or synthetic ones."""

    def __init__(self, config: RunConfig, kind: str):
        mesh = make_mesh(config.parallel)
        self._number, self._loader = 0, build_components(config, mesh).loader if kind == "data" else None
        if kind != "data":
            rows = SyntheticRows(config, kind)
            self._batches = [self._batch(rows, config) for _ in range(NUM_SYNTHETIC_STEPS)]

    def next(self) -> list[PackedBatch]:
        self._number += 1
        return self._loader.next() if self._loader else self._batches[self._number % NUM_SYNTHETIC_STEPS]

    @staticmethod
    def _batch(rows: SyntheticRows, config: RunConfig) -> list[PackedBatch]:
        size = config.train.micro_batch_size
        batches = [
            collate([rows.next() for _ in range(size)]) for _ in range(config.train.global_batch_size // size)
        ]
        if torch.cuda.is_available():
            batches = [batch.pinned() for batch in batches]
        return batches


def measure(config: RunConfig, rows: str, num_steps: int, num_warmup_steps: int) -> tuple[dict, "Step"]:
    """Seconds of whole steps, then of their phases, each of which waits for the device; the step."""
    began = time.perf_counter()
    step = Step(config, rows)
    figures: dict = {"set_up_seconds": time.perf_counter() - began}
    warm = step.run(num_warmup_steps)
    figures["first_step_seconds"] = warm[0]
    if step.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    times = step.run(num_steps)
    seconds = statistics.median(times)
    num_positions = config.train.global_batch_size * config.data.sequence_length
    work = Work.of(torch.stack(step.work[-num_steps:]).double().mean(0).tolist())
    flops = step_flops(
        config.train.global_batch_size, config.model, config.sequence_shape, work, config.objective.alignment
    )
    peak = peak_flops(config.train.precision)
    figures |= {
        "step_seconds": seconds,
        "fastest_and_slowest": [min(times), max(times)],
        "tokens_per_second": num_positions / seconds,
        "visible_keys_per_query": work.visible_pairs / num_positions,
        "text_target_share": work.text_targets / num_positions,
        "tflop_per_step": flops / 1e12,
        "mfu": flops / seconds / peak if peak else None,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if step.on_gpu else None,
        "losses": step.losses,
    }
    if step.on_gpu:
        figures["copy_seconds"] = step.copy_seconds()
    phases = [step.phases() for _ in range(num_steps)]
    figures |= {name: statistics.median(each[name] for each in phases) for name in PHASES}
    return figures, step


def start_on_device(weight: Weight, shape: torch.Size, num_layers: int, seed: int) -> torch.Tensor:
    """Random weights as spread as a run's: its own, which the host samples, would take a minute for 1.4B."""
    value = torch.zeros(shape, device="cuda")
    return value.normal_(std=0.02) if value.ndim > 1 else value.fill_(weight.init == "ones")


class Step:
    """A run's engine, and its steps."""

    def __init__(self, config: RunConfig, rows: str):
        start_process_group()
        if torch.cuda.is_available():
            parallelize.initial_value = start_on_device
        self._rows = Rows(config, rows)
        self.engine: Engine = build_engine(config, make_mesh(config.parallel))
        self._ema = Ema(self.engine.optimizer_state.shards, config.train.ema_decay)
        self.on_gpu = self.engine.device.type == "cuda"
        self._num_sizes = len(config.model.image_sizes)
        self.losses: list[float] = []
        self.work: list[torch.Tensor] = []
        self._number = 0

    def run(self, num_steps: int) -> list[float]:
        """Make steps as training does, where the host waits for the device at none; seconds of each."""
        losses, marks = [], [self._mark()]
        for _ in range(num_steps):
            batches = self._rows.next()
            self.update(batches)
            marks.append(self._mark())
            losses.append(self.engine.consensus.losses[-1].clone())
            self.work.append(torch.stack([batch.work(self._num_sizes) for batch in batches]).sum(0))
        self.finish()
        self.losses += torch.stack(losses).tolist()
        if self.on_gpu:
            return [begin.elapsed_time(end) / 1e3 for begin, end in pairwise(marks)]
        return [end - begin for begin, end in pairwise(marks)]

    def _mark(self) -> Any:
        """The time, where the device is in its work."""
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def update(self, batches: list[PackedBatch]) -> None:
        """A step without waiting for the device."""
        self._number += 1
        train_step(self.engine, batches, RATE, self._ema.after(self._number))

    def phases(self) -> dict[str, float]:
        """Seconds of each phase of one step, waiting for the device after each."""
        engine, spent = self.engine, dict.fromkeys(PHASES, 0.0)
        deepspeed = engine._deepspeed  # its phases, which forward_backward does not separate
        last = time.perf_counter()

        def lap(phase: str) -> None:
            nonlocal last
            self.finish()
            previous, last = last, time.perf_counter()
            spent[phase] += last - previous

        batches = self._rows.next()
        counts = engine.consensus.reduce_counts(torch.stack([batch.counts() for batch in batches]).sum(0))
        lap("data")
        for batch in batches:
            losses = deepspeed(with_counts(batch.to(engine.device), counts))
            engine.consensus.add_losses(losses)
            lap("forward")
            deepspeed.backward(losses.total * len(batches))
            lap("backward")
            deepspeed.step()
        self._number += 1
        engine.clip_and_step(RATE, self._ema.after(self._number))
        lap("optimizer")
        return spent

    def copy_seconds(self) -> float:
        """Seconds to copy a step's micro-batches to the GPU, which a step does beside its work."""
        batches = self._rows.next()
        self.finish()
        begin = self._mark()
        for batch in batches:
            batch.to(self.engine.device)
        end = self._mark()
        self.finish()
        return begin.elapsed_time(end) / 1e3

    def finish(self) -> None:
        """Wait for the device."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def host_syncs(self) -> list[str]:
        """File and line of each place where one step makes the host wait for the GPU."""
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self.update(self._rows.next())
        torch.cuda.set_sync_debug_mode("default")
        return [f"{w.filename.rpartition('site-packages/')[2]}:{w.lineno}" for w in caught]

    def trace(self, path: Path) -> None:
        """Write one step's trace, which Perfetto opens."""
        with torch.profiler.profile() as profile:
            self.update(self._rows.next())
            self.finish()
        profile.export_chrome_trace(str(path))


def machine() -> dict:
    """The values that the figures depend on."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
        "torch": torch.__version__,
        "num_threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d"),
    }


def processor() -> str:
    """The processor's name, where the system tells it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", nargs="?", default="configs/quickstart.yaml", help="run configuration")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="values that replace the file's")
    parser.add_argument("--rows", choices=["data", "mixed", "text", "pairs"], default="data")
    parser.add_argument("--steps", type=int, default=10, help="steps measured")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them")
    parser.add_argument("--name", help="of this line among the results")
    parser.add_argument(
        "--syncs",
        action="store_true",
        help="fail if the host waits for the GPU, and name where",
    )
    parser.add_argument("--trace", type=Path, metavar="FILE", help="trace of one step, for Perfetto")
    parser.add_argument("--json", metavar="FILE", help="append the figures as a line of JSON; - prints it")
    options = parser.parse_intermixed_args()
    config = load_config(RunConfig, Path(options.config), options.overrides)
    figures, step = measure(config, options.rows, options.steps, options.warmup)
    record = {"name": options.name or options.config, "overrides": options.overrides, "rows": options.rows}
    record |= figures | machine()
    if options.syncs and step.on_gpu:
        record["host_syncs"] = step.host_syncs()
    if options.trace:
        step.trace(options.trace)
    show(record)
    if options.json == "-":
        print(json.dumps(record, indent=1))
    elif options.json:
        path = Path(options.json)
        before = path.read_text() if path.exists() else ""
        write_file(path, before + json.dumps(record) + "\n")
    if syncs := record.get("host_syncs"):
        raise SystemExit(f"a step waits for the GPU at {', '.join(syncs)}")


def show(record: dict) -> None:
    """Print a table."""
    mfu = "" if record["mfu"] is None else f", MFU {record['mfu']:.1%}"
    memory = "" if record["peak_gib"] is None else f", {record['peak_gib']:.1f} GiB"
    speed = f"{record['step_seconds']:.3f} s a step, {record['tokens_per_second']:,.0f} tokens/s"
    table = Table("phase", "seconds", "share", title=f"{record['name']}: {speed}{mfu}{memory}")
    whole = sum(record[phase] for phase in PHASES)
    for phase in PHASES:
        table.add_row(phase, f"{record[phase]:.4f}", f"{record[phase] / whole:.0%}")
    Console(stderr=True).print(table)


if __name__ == "__main__":
    main()
