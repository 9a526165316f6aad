"""The cost of each arm of a sweep beside its first: seconds of a training step, memory and parameters.

    python benchmarks/recipes.py [SWEEP.yaml] [SWEEP_KEY=VALUE ...] [--rounds 20] [--json FILE]

A round makes a step of each arm, in an order that turns; a figure is the median over rounds of a step's
seconds over the first arm's in the same round. Seconds are the processor's own, so that other work does not
count (nor a loader's worker processes); those by the clock are beside. Rows are the run's own data, of the
first point of the sweep's grid. Memory: by how much a process of its own grows at its peak, from before the
model is made; on a GPU, what it allocates.
recipes_table.py makes the table of docs/recipe.md of this and of the sweep's results.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from memory import peak_growth
from train import Step

from megafusion.config import parse_config
from megafusion.errors import UserError, exit_on_user_error
from megafusion.sweep.config import load_sweep
from megafusion.sweep.members import expand
from megafusion.train.config import RunConfig
from megafusion.yaml_values import parse_yaml


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sweep", nargs="?", default="configs/sweeps/recipes.yaml", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--rows", choices=("data", "mixed", "pairs"), default="data")
    parser.add_argument("--memory", metavar="ARM", help="print the peak memory of one arm, in bytes")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    configs = first_runs(arguments.sweep, arguments.overrides)
    if arguments.memory:
        if arguments.memory not in configs:
            raise UserError(
                f"--memory {arguments.memory}: no arm of {arguments.sweep}, which has {', '.join(configs)}"
            )
        print(peak_memory(configs[arguments.memory], arguments.rows))
        return
    names = list(configs)
    memory = {name: peak_memory_apart(name, arguments) for name in names}
    steps = {name: Step(config, arguments.rows) for name, config in configs.items()}
    for step in steps.values():
        step.run(2)
    rounds = []
    for number in range(arguments.rounds):
        order = [names[(number + i) % len(names)] for i in range(len(names))]
        rounds.append({name: timed(steps[name]) for name in order})
    report = {
        "sweep": str(arguments.sweep),
        "overrides": arguments.overrides,
        "rows": arguments.rows,
        "rounds": arguments.rounds,
        "arms": {
            name: {
                "seconds": statistics.median(each[name][0] for each in rounds),
                **over_first(rounds, name, names[0]),
                "parameters": sum(p.numel() for p in steps[name].engine.stage.parameters()),
                "peak_bytes": memory[name],
                "peak_bytes_over_first": memory[name] / memory[names[0]],
            }
            for name in names
        },
        "device": platform.machine(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "torch": version("torch"),
        "date": time.strftime("%Y-%m-%d"),
    }
    print(json.dumps(report, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


def first_runs(sweep: Path, overrides: list[str]) -> dict[str, RunConfig]:
    """The configuration of the first run of each arm."""
    configs: dict[str, RunConfig] = {}
    for member in expand(load_sweep(sweep, overrides), str(sweep)):
        configs.setdefault(member.arm, parse_config(RunConfig, parse_yaml(member.config), member.name))
    return configs


def timed(step: Step) -> tuple[float, float]:
    """Seconds of a step: of the processor, and by the clock."""
    began = time.process_time()
    (clock,) = step.run(1)
    return time.process_time() - began, clock


def over_first(rounds: list[dict[str, tuple[float, float]]], name: str, first: str) -> dict:
    """The ratios of an arm's seconds to the first's."""
    processor, clock = ([each[name][i] / each[first][i] for each in rounds] for i in (0, 1))
    return {
        "over_first": statistics.median(processor),
        "quartiles": statistics.quantiles(processor, n=4)[::2],
        "over_first_by_clock": statistics.median(clock),
    }


def peak_memory(config: RunConfig, rows: str) -> int:
    """Bytes by which this process grows at the most in three steps."""
    Step(config.model_copy(update={"model": config.model.model_copy(update={"num_layers": 1})}), rows).run(1)
    return peak_growth(lambda: Step(config, rows).run(3))


def peak_memory_apart(name: str, arguments: argparse.Namespace) -> int:
    """The same in a process of its own."""
    command = [sys.executable, __file__, str(arguments.sweep), *arguments.overrides]
    command += ["--rows", arguments.rows, "--memory", name]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    with exit_on_user_error():
        main()
