"""The cost of weights per modality for a step: the same rows, dense and not, in turns.

    python benchmarks/modality.py [CONFIG] [KEY=VALUE ...] [--rounds 20] [--rows mixed] [--json FILE]

Every model multiplies a position by as many weights (equal active parameters). A round makes a step of each,
in an order that turns; a figure is the median over rounds of a step's seconds over the dense step's in the
same round. Seconds are the processor's own, so that other work does not count; those by the clock are beside.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import torch
from train import Step

from megafusion.config import load_config
from megafusion.train.config import RunConfig

KINDS = ("none", "feed_forward", "all")


def timed(step: Step) -> tuple[float, float]:
    """Seconds of a step: of the processor, and by the clock."""
    began = time.process_time()
    (clock,) = step.run(1)
    return time.process_time() - began, clock


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", nargs="?", default="configs/quickstart.yaml", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--rows", choices=("data", "mixed", "pairs"), default="mixed")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    steps: dict[str, Step] = {}
    for kind in KINDS:
        overrides = [*arguments.overrides, f"model.modality_weights={kind}"]
        steps[kind] = Step(load_config(RunConfig, arguments.config, overrides), arguments.rows)
        steps[kind].run(2)
    rounds = []
    for number in range(arguments.rounds):
        order = [KINDS[(number + i) % len(KINDS)] for i in range(len(KINDS))]
        found = {kind: timed(steps[kind]) for kind in order}
        rounds.append({kind: found[kind] for kind in KINDS})
    ratios, by_clock = (
        {kind: [each[kind][which] / each["none"][which] for each in rounds] for kind in KINDS}
        for which in (0, 1)
    )
    report = {
        "config": str(arguments.config),
        "overrides": arguments.overrides,
        "rows": arguments.rows,
        "rounds": arguments.rounds,
        "seconds": {kind: statistics.median(each[kind][0] for each in rounds) for kind in KINDS},
        "over_dense": {kind: statistics.median(found) for kind, found in ratios.items()},
        "quartiles": {kind: statistics.quantiles(found, n=4)[::2] for kind, found in ratios.items()},
        "over_dense_by_clock": {kind: statistics.median(found) for kind, found in by_clock.items()},
        "parameters": {
            kind: sum(p.numel() for p in step.engine.stage.parameters()) for kind, step in steps.items()
        },
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    print(json.dumps(report, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
