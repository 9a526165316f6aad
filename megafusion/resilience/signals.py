"""SIGTERM and SIGUSR1, which a queue sends ahead of a time limit or to make room; SIGINT, of Ctrl-C."""

import os
import signal
import threading
from types import FrameType

from megafusion.processes import STOP_SIGNALS

SAID = b"\nmegafusion: ends after this step, with a checkpoint; Ctrl-C again ends it at once, without one\n"


class StopSignals:
    """Notes that this process was asked to stop; the step goes on, and all ranks agree at its end.

    Further signals change nothing: a queue repeats them, and what they ask for is under way; only a second
    SIGINT is a KeyboardInterrupt. Until `begin` nothing is lost, so the process ends at once with status 75.
    """

    def __init__(self):
        self.requested = False
        self._has_begun = self._is_interrupted = False

    def listen(self) -> "StopSignals":
        """Take the signals from now on, until the process ends. Called in the main thread."""
        for number in STOP_SIGNALS:
            # A shell keeps Ctrl-C from its background; the others are for us, whoever ignores them.
            if number != signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._note)
        # A thread hears of a signal while the main one waits in C for the other ranks to appear.
        heard, told = os.pipe()
        os.set_blocking(told, False)
        signal.set_wakeup_fd(told, warn_on_full_buffer=False)
        threading.Thread(target=self._hear, args=(heard,), name="signals", daemon=True).start()
        return self

    def begin(self) -> None:
        """From now on other ranks wait for this one."""
        self._has_begun = True

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._is_interrupted:
                raise KeyboardInterrupt
            self._is_interrupted = True
            os.write(2, SAID)  # not by print, which the signal may have come into
        self.requested = True

    def _hear(self, heard: int) -> None:
        while numbers := os.read(heard, 64):
            if not self._has_begun and any(number in STOP_SIGNALS for number in numbers):
                os._exit(os.EX_TEMPFAIL)
