"""SIGTERM and SIGUSR1: what a queue sends ahead of a time limit or to make room."""

import signal
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopSignals:
    """Notes that this process was asked to stop; the step goes on, and all ranks agree at its end.

    Further signals change nothing: a queue repeats them, and what they ask for is under way.
    """

    def __init__(self):
        self.requested = False

    def listen(self) -> "StopSignals":
        """Take the signals from now on, until the process ends. Called in the main thread."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True


def ignore_stop_signals() -> None:
    """For processes that end with the one which started them: a queue signals these too."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
