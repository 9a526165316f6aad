"""Stop signals: SIGTERM and SIGUSR1 of a queue, SIGINT of a terminal, SIGHUP of one that is closed."""

import os
import signal
import threading
from types import FrameType

from megafusion.errors import ExitStatus
from megafusion.processes import STOP_SIGNALS

MESSAGE = b"\nmegafusion: saves a checkpoint after this step and exits; Ctrl-C again exits now, without one\n"


class StopSignals:
    """Records that this process was asked to stop. All ranks agree on the stop at the end of the step.

    Further signals have no effect, because queues repeat them; but a second SIGINT raises KeyboardInterrupt.
    Until `begin` there is nothing to save, so the process exits at once with RETRY.
    """

    def __init__(self):
        self.requested = False
        self._has_begun = self._is_interrupted = False

    def listen(self) -> "StopSignals":
        """Install the handlers, for the rest of the process. Called in the main thread."""
        for number in STOP_SIGNALS:
            # A shell lets its background jobs ignore Ctrl-C, and nohup SIGHUP; node.sh ignores the others.
            may_be_ignored = number in (signal.SIGINT, signal.SIGHUP)
            if not (may_be_ignored and signal.getsignal(number) == signal.SIG_IGN):
                signal.signal(number, self._handle)
        # Python runs no handler while the main thread waits in C for the other ranks, but a thread can read
        # the signal from a pipe.
        read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        threading.Thread(
            target=self._exit_before_begin, args=(read_end,), name="signals", daemon=True
        ).start()
        return self

    def begin(self) -> None:
        """Let signals wait for the end of a step from now on: the other ranks depend on this one."""
        self._has_begun = True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._is_interrupted:
                raise KeyboardInterrupt
            self._is_interrupted = True
            os.write(2, MESSAGE)  # not print, which the signal may have interrupted
        self.requested = True

    def _exit_before_begin(self, pipe: int) -> None:
        while numbers := os.read(pipe, 64):
            if not self._has_begun and any(number in STOP_SIGNALS for number in numbers):
                os._exit(ExitStatus.RETRY)
