"""Detection of loss spikes."""

import statistics
from collections import deque

from megafusion.resilience.config import ResilienceConfig

WINDOW, MIN_LOSSES = 128, 32
MIN_RELATIVE_DEVIATION = 0.01
"""Lower bound of the standard deviation, as a fraction of the mean: without it any change of a flat loss
would be a spike."""


class SpikeDetector:
    """The latest losses of steps that were not skipped, and whether the next one is a spike.

    Every rank keeps the same losses, and checkpoints hold them, so a resumed run decides as an uninterrupted
    one.
    """

    def __init__(self, config: ResilienceConfig):
        self.action, self._sigmas = config.spikes, config.spike_sigmas
        self.losses: deque[float] = deque(maxlen=WINDOW)

    def is_spike(self, loss: float) -> bool:
        """Whether a finite loss is more than `spike_sigmas` deviations above the mean of the window."""
        if self.action == "off" or len(self.losses) < MIN_LOSSES:
            return False
        mean = statistics.fmean(self.losses)
        deviation = max(statistics.pstdev(self.losses, mean), MIN_RELATIVE_DEVIATION * abs(mean))
        return loss > mean + self._sigmas * deviation

    def add(self, loss: float) -> None:
        """Add the loss of a step that was not skipped."""
        if self.action != "off":
            self.losses.append(loss)
