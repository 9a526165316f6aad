"""The thread on every rank that notices a run that stands still, a lost rank, and a verdict of others."""

import faulthandler
import signal
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

from megafusion.resilience.watchdog.failures import describe, is_lost
from megafusion.resilience.watchdog.heartbeat import LocalState
from megafusion.resilience.watchdog.peers import Peers
from megafusion.resilience.watchdog.shutdown import end_run


class Watchdog:
    """Watches the process while its block runs; made on every rank once the process group exists.

    folder: the run folder; stacks go to its `stacks/rank-00000.txt` and so on, the message to `stacks/report-
    <time>.txt`. timeout_seconds: longest time between two beats, to within an interval. interval_seconds:
    between two heartbeats. silence_seconds: a rank without a heartbeat for so long is dead or stopped.

    Exceptions of the block pass, and the other ranks are told; but one that says that a peer is gone ends
    the process with EXIT_STATUS. A lone process only looks at its own beats.
    """

    def __init__(
        self,
        folder: Path,
        timeout_seconds: float,
        interval_seconds: float = 3.0,
        silence_seconds: float = 15.0,
    ):
        self._folder = folder / "stacks"
        self._timeout, self._interval, self._silence = timeout_seconds, interval_seconds, silence_seconds
        self._here = LocalState()
        self._others = Peers(self._here, interval_seconds, silence_seconds)
        self._looked = time.monotonic()
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self, step: int, phase: str) -> None:
        """Say that the run has come to a phase of a step (a string such as "train" or "checkpoint")."""
        self._here.beat, self._here.beat_at = (step, phase), self._here.now

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        is_alone = self._here.world == 1
        if error is not None and not is_alone and is_lost(error):
            # The launcher ends all others as soon as it sees the lost rank, within a second; the message
            # comes first, and this process ends by itself.
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            self._here.error, self._here.error_at = error, self._here.now
            self._wake.set()
            self._thread.join()  # it ends the process
        self._here.end = "finished" if error is None else describe(error)
        self._wake.set()
        self._thread.join(self._silence)
        if not is_alone:
            faulthandler.cancel_dump_traceback_later()
            self._others.part()

    def _watch(self) -> None:
        while self._here.end is None:
            reason = self._look()
            if reason and self._here.end is None:
                end_run(reason, self._here, self._others, self._folder, self._interval)
            self._wake.wait(self._interval)
            self._wake.clear()

    def _look(self) -> str | None:
        """Exchange heartbeats; the reason to end the run, if there is one."""
        here, looked = self._here, time.monotonic()
        # A process that was stopped and goes on has not stalled meanwhile.
        here.now += min(looked - self._looked, 2 * self._interval)
        self._looked = looked
        if here.world > 1:
            # Should some call keep Python's lock, this thread cannot run: a timer in C ends the process then.
            faulthandler.dump_traceback_later(3 * self._silence, exit=True, file=sys.__stderr__)
            if reason := self._others.reason():
                return reason
        if here.now - here.beat_at > self._timeout:
            step, phase = here.beat
            return (
                f"rank {here.rank} made no progress for {self._timeout:g} s (train.timeout_seconds) "
                f"at step {step}, {phase}"
            )
        return None
