"""Losses that jump."""

import statistics
from collections import deque

from megafusion.resilience.config import HealthConfig

WINDOW, FEWEST = 128, 32
# Losses that hardly move would make any change a jump: the deviation counts as this share of the mean, at
# least.
LEAST_DEVIATION = 0.01


class Spikes:
    """The latest losses of steps that counted, and whether another one is out of their range.

    Every rank keeps the same, and checkpoints hold them: a resumed run decides as an uninterrupted one.
    """

    def __init__(self, config: HealthConfig):
        self.action, self._sigmas = config.spikes, config.spike_sigmas
        self.losses: deque[float] = deque(maxlen=WINDOW)

    def is_spike(self, loss: float) -> bool:
        """Whether a finite loss is more than `spike_sigmas` deviations over the mean of those before."""
        if self.action == "off" or len(self.losses) < FEWEST:
            return False
        mean = statistics.fmean(self.losses)
        deviation = max(statistics.pstdev(self.losses, mean), LEAST_DEVIATION * abs(mean))
        return loss > mean + self._sigmas * deviation

    def add(self, loss: float) -> None:
        """A loss of a step that counted."""
        if self.action != "off":
            self.losses.append(loss)
