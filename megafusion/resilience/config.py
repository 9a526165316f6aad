"""What a run does about bad steps and crashes."""

from typing import Literal

from pydantic import Field

from megafusion.config import Config


class HealthConfig(Config):
    """When a step is left out, when a run goes back, and when it is not started again."""

    roll_back_after: int = Field(5, gt=0)
    """Steps left out in a row before the run goes back to its last checkpoint, past the data since then."""
    spikes: Literal["off", "warn", "skip"] = "off"
    """What happens to a step whose loss jumps: nothing; it is counted and said; it is left out."""
    spike_sigmas: float = Field(6.0, gt=0)
    """A jump is more than so many standard deviations over the mean of the last 128 losses (32 at least)."""
    max_crashes: int = Field(3, ge=0)
    """Crashes in a row at the same step after which the run is not started again; 0 for no limit."""
