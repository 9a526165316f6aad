"""Configuration of failure handling: skipped steps, rollbacks, crash loops, the watchdog."""

from typing import Literal

from pydantic import Field

from megafusion.config import Config


class ResilienceConfig(Config):
    """When a step is skipped, when a run rolls back, and when it is not restarted."""

    roll_back_after: int = Field(5, gt=0)
    """Consecutive skipped steps after which the run rolls back to its last checkpoint and skips the data
    since then."""
    spikes: Literal["off", "warn", "skip"] = "off"
    """Action on a loss spike: off, none; warn, count and report it; skip, also skip the step."""
    spike_sigmas: float = Field(6.0, gt=0)
    """A spike is more than this many standard deviations above the mean of the last 128 losses (at least
    32)."""
    max_crashes: int = Field(3, ge=0)
    """Consecutive attempts that crashed without a new checkpoint, after which the run is not restarted; 0
    for no limit."""
    timeout_seconds: float = Field(600.0, gt=0, le=1e8)
    """Longest time without progress in one step, checkpoint or start-up before every rank dumps its stacks
    and exits."""
