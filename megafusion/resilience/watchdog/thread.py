"""The watchdog thread of a rank: detects a hang, a lost rank, and a shutdown by another rank."""

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
from megafusion.resilience.watchdog.shutdown import shut_down


class Watchdog:
    """Watches the process while its block runs. Made on every rank, after the process group.

    folder: of the run; stacks go to stacks/rank-00000.txt and so on, the message to stacks/report-TIME.txt.
    timeout_seconds: longest time between two beats, to within an interval. The others: see LocalState.

    An exception of the block propagates and the other ranks are told; but one that means that a peer is lost
    exits the process with RETRY. A single process watches its own beats alone.
    """

    def __init__(
        self,
        folder: Path,
        timeout_seconds: float,
        interval_seconds: float = 3.0,
        silence_seconds: float = 15.0,
    ):
        self._timeout = timeout_seconds
        self._local = LocalState(folder / "stacks", interval_seconds, silence_seconds)
        self._peers = Peers(self._local)
        self._checked_at = time.monotonic()
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self, step: int, phase: str) -> None:
        """Report progress: the run has reached a phase of a step, such as "train" or "checkpoint"."""
        self._local.beat, self._local.beat_at = (step, phase), self._local.now

    def __enter__(self) -> "Watchdog":
        if self._local.world_size > 1:
            faulthandler.register(signal.SIGALRM, file=sys.__stderr__, chain=True)  # type: ignore[arg-type]
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        is_alone = self._local.world_size == 1
        if error is not None and not is_alone and is_lost(error):
            # The launcher terminates all ranks within a second of the loss; the message must come first, and
            # then this process exits by itself.
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            self._local.error, self._local.error_at = error, self._local.now
            self._wake.set()
            self._thread.join()  # the thread exits the process
        self._local.end = "finished" if error is None else describe(error)
        self._wake.set()
        self._thread.join(self._local.silence)
        if not is_alone:
            signal.setitimer(signal.ITIMER_REAL, 0)
            faulthandler.unregister(signal.SIGALRM)
            self._peers.leave()

    def _watch(self) -> None:
        while self._local.end is None:
            reason = self._check()
            if reason and self._local.end is None:
                shut_down(reason, self._local, self._peers)
            self._wake.wait(self._local.interval)
            self._wake.clear()

    def _check(self) -> str | None:
        """Exchange heartbeats; returns the reason to shut down, if there is one."""
        local, now = self._local, time.monotonic()
        # The time for which a process was stopped by SIGSTOP does not count.
        local.now += min(now - self._checked_at, 2 * local.interval)
        self._checked_at = now
        if local.world_size > 1:
            # If a call keeps the GIL, this thread cannot run: a signal ends the process, and a handler in C
            # writes its stacks. So does it end one that was stopped for so long. Launchers restart both.
            signal.setitimer(signal.ITIMER_REAL, 3 * local.silence)
            if reason := self._peers.check():
                return reason
        if local.now - local.beat_at > self._timeout:
            step, phase = local.beat
            return (
                f"rank {local.rank} made no progress for {self._timeout:g} s (resilience.timeout_seconds) "
                f"at step {step}, {phase}"
            )
        return None
