"""How long does a checkpoint block training, and how long does it take to write?

    python benchmarks/checkpoint.py [--json [FILE]]

Needs the quickstart's shards (`make preprocess`). A save blocks for the copy to host memory; a thread
writes during the steps that follow. Seconds are medians.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from step import Stopwatch, processor

from megafusion.checkpoint.config import CheckpointConfig
from megafusion.checkpoint.folder import complete_checkpoints, read_manifest
from megafusion.checkpoint.manager import CheckpointManager
from megafusion.config import load_config
from megafusion.engine.ema import Ema
from megafusion.engine.process_group import start_process_group
from megafusion.parallel.mesh import make_mesh
from megafusion.storage import write_file
from megafusion.train.build import build_components, build_engine
from megafusion.train.config import RunConfig
from megafusion.train.loop import train_step


def measure(config: RunConfig, num_saves: int, folder: Path) -> dict:
    """Seconds of a step, a step during a write, the stall, the write and a load."""
    start_process_group()
    mesh = make_mesh(config.parallel)
    loader, engine = build_components(config, mesh).loader, build_engine(config, mesh)
    ema = Ema(engine.optimizer_state.shards, config.train.ema_decay)
    names = ("step", "first_stall", "stall", "step_while_writing", "write", "load")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    watch = Stopwatch(engine.device)

    def step() -> float:
        batch = loader.next()
        watch.lap()
        train_step(engine, batch, 1e-3)
        return watch.lap()

    for _ in range(3):
        step()
    with CheckpointManager(folder, engine.optimizer_state, ema, CheckpointConfig(keep_last=1)) as manager:
        for number in range(num_saves + 1):
            seconds["step"].append(step())
            watch.lap()
            begin = time.perf_counter()
            manager.save({"step": number + 1}, loader.state_dict())
            seconds["stall" if number else "first_stall"].append(watch.lap())
            seconds["step_while_writing"].append(step())
            manager.wait()
            seconds["write"].append(time.perf_counter() - begin)
        (latest,) = complete_checkpoints(folder)
        watch.lap()
        manager.load(latest)
        seconds["load"].append(watch.lap())
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        **medians,
        "stall_of_step": medians["stall"] / medians["step"],
        "num_bytes": sum(entry["bytes"] for entry in read_manifest(latest).values()),
        "num_parameters": sum(p.numel() for p in engine.stage.parameters()),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config", type=Path, default=Path("configs/quickstart.yaml"), help="run configuration"
    )
    parser.add_argument("--saves", type=int, default=8, help="checkpoints measured, after the first")
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="write the figures as JSON")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="values that replace the file's")
    arguments = parser.parse_args()
    config = load_config(RunConfig, arguments.config, arguments.overrides)
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(config, arguments.saves, Path(folder))
    title = f"{figures['num_parameters']:,} parameters, {figures['num_bytes']:,} bytes"
    table = Table("phase", "seconds", "of a step", title=title)
    for name in ("step", "first_stall", "stall", "step_while_writing", "write", "load"):
        table.add_row(name, f"{figures[name]:.4f}", f"{figures[name] / figures['step']:.1%}")
    Console(stderr=True).print(table)
    if arguments.json == "-":
        print(json.dumps(figures, indent=1))
    elif arguments.json:
        write_file(Path(arguments.json), json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
