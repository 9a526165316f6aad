"""How long is a training step of the quickstart model, and where does the time go?

    python benchmarks/step.py [--json [FILE]]

Needs the quickstart's shards (`make preprocess`). Seconds are medians over the steps.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from megafusion.config import load_config
from megafusion.engine.process_group import start_process_group
from megafusion.parallel.mesh import make_mesh
from megafusion.sequence.packing import with_counts
from megafusion.storage import write_file
from megafusion.train.build import build_components, build_engine
from megafusion.train.config import RunConfig

PHASES = ("data", "forward", "backward", "optimizer")


def measure(config: RunConfig, num_steps: int, num_warmup_steps: int = 3) -> dict:
    """Median seconds of each phase of a step, and positions a second."""
    start_process_group()
    mesh = make_mesh(config.parallel)
    parts = build_components(config, mesh)
    engine = build_engine(config, mesh)
    deepspeed = engine._deepspeed  # its phases, which forward_backward does not separate
    seconds: dict[str, list[float]] = {phase: [] for phase in PHASES}
    for step in range(num_warmup_steps + num_steps):
        spent = dict.fromkeys(PHASES, 0.0)
        watch = Stopwatch(engine.device)
        micro_batches = parts.loader.next()
        counts = torch.stack([batch.counts() for batch in micro_batches]).sum(0)
        counts = engine.consensus.reduce_counts(counts)
        spent["data"] += watch.lap()
        for batch in micro_batches:
            losses = deepspeed(with_counts(batch.to(engine.device), counts))
            engine.consensus.add_losses(losses)
            spent["forward"] += watch.lap()
            deepspeed.backward(losses.total * len(micro_batches))
            spent["backward"] += watch.lap()
            deepspeed.step()
        engine.clip_and_step(1e-3)
        spent["optimizer"] += watch.lap()
        if step >= num_warmup_steps:
            for phase in PHASES:
                seconds[phase].append(spent[phase])
    medians = {phase: statistics.median(values) for phase, values in seconds.items()}
    positions = config.train.global_batch_size * config.data.sequence_length
    return {
        "tokens_per_second": positions / sum(medians.values()),
        **medians,
        "num_steps": num_steps,
        "num_threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def processor() -> str:
    """The processor's name, where the system tells it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


class Stopwatch:
    """Seconds between laps, the device's work finished at each."""

    def __init__(self, device: torch.device):
        self._device, self._last = device, time.perf_counter()

    def lap(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        previous, self._last = self._last, time.perf_counter()
        return self._last - previous


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config", type=Path, default=Path("configs/quickstart.yaml"), help="run configuration"
    )
    parser.add_argument("--steps", type=int, default=10, help="steps measured, after three to warm up")
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="write the figures as JSON")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="values that replace the file's")
    arguments = parser.parse_args()
    figures = measure(load_config(RunConfig, arguments.config, arguments.overrides), arguments.steps)
    whole = sum(figures[phase] for phase in PHASES)
    table = Table(
        "phase", "seconds", "share", title=f"{figures['tokens_per_second']:,.0f} positions a second"
    )
    for phase in PHASES:
        table.add_row(phase, f"{figures[phase]:.3f}", f"{figures[phase] / whole:.0%}")
    Console(stderr=True).print(table)
    if arguments.json == "-":
        print(json.dumps(figures, indent=1))
    elif arguments.json:
        write_file(Path(arguments.json), json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
