"""The share of time that trains: failures, checkpoints and restarts."""

import math
from typing import NamedTuple

HOURS = 54 * 24.0
FAILURES_PER_GPU_HOUR = 419 / (HOURS * 16_384)
"""419 unexpected interruptions in 54 days on 16,384 GPUs: Llama 3's report, arXiv 2407.21783."""
STALL_BYTES_PER_SECOND = 55_984_174 / 0.00884
"""A rank's copy of its state while training waits: benchmarks/results/2026-11-25-checkpoint-2-cores.json."""
RESTART_SECONDS = 69.0
"""From a death that nothing announced to the next step, on a SLURM of two nodes (docs/results.md)."""


class Goodput(NamedTuple):
    """How often to save, and what failures, saves and restarts leave."""

    failure_seconds: float
    """Mean time between failures of any GPU of the run."""
    stall: float
    restart: float
    every: int
    """Steps between checkpoints that lose least (Young's and Daly's first-order optimum)."""
    share: float
    """Of the time that trains, saving every so many steps."""


def goodput(
    world_size: int,
    step_seconds: float,
    state_bytes: float,
    *,
    failures: float = FAILURES_PER_GPU_HOUR,
    restart: float = RESTART_SECONDS,
    every: int | None = None,
) -> Goodput:
    """failures: of a GPU in an hour. state_bytes: what a rank saves. every: instead of the best."""
    stall = state_bytes / STALL_BYTES_PER_SECOND
    between = 3600 / (world_size * failures) if failures else math.inf

    def saving_every(steps: int) -> Goodput:
        interval = steps * step_seconds
        # A failure loses half an interval and a restart; a save, its stall.
        lost = (interval / 2 + stall + restart) / between
        return Goodput(between, stall, restart, steps, max(0.0, 1 - lost) * interval / (interval + stall))

    if every is not None:
        return saving_every(every)
    best = math.sqrt(2 * stall * between) / step_seconds if failures else 1e6
    return max(
        (saving_every(max(1, steps)) for steps in (math.floor(best), math.ceil(best))),
        key=lambda found: found.share,
    )
