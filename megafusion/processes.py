"""Signals, standard streams, ranks and lifetime of the processes that a command starts."""

import multiprocessing
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, TextIO

from megafusion.errors import ExitStatus, UserError

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""Requests to stop, from Ctrl-C, a queue, a launcher or a closed terminal. The trainer handles them, its
worker processes ignore them."""


def exit_on_stop_signals() -> None:
    """Let SIGTERM, SIGUSR1 and SIGHUP end this process with RETRY, as an exception would.

    For commands that resume by themselves; one that is ignored, as by nohup, stays so.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        if frame and frame.f_code.co_name == "_call_with_frames_removed":
            # An import compiles a module or loads a library. Python's compiler drops exceptions where it
            # folds a constant, as 2**63: so a moment later.
            signal.signal(signal.SIGALRM, lambda _, later: stop(number, later))
            signal.setitimer(signal.ITIMER_REAL, 0.01)
            return
        with suppress(OSError):  # of a closed terminal
            os.write(2, f"\nstopped by {signal.Signals(number).name}; run the same command again\n".encode())
        raise SystemExit(ExitStatus.RETRY)

    for number in STOP_SIGNALS:
        if number != signal.SIGINT and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, stop)


@contextmanager
def stop_signals_wait() -> Iterator[Callable[[], bool]]:
    """Let stop signals wait for a good moment: yields a function that says whether one has come.

    After the block it has the effect that it would have had before; a second one has it at once. If the block
    raises, its error goes on and the signal is dropped. Ignored ones stay so, and those handled in C, which
    Python could not restore. Outside the main thread, which alone receives signals, nothing changes.
    """
    came: list[int] = []
    before: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)
        before.clear()

    def record(number: int, frame: FrameType | None) -> None:
        came.append(number)
        restore()

    if threading.current_thread() is threading.main_thread():
        for number in STOP_SIGNALS:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, record)
    try:
        yield lambda: bool(came)
    finally:
        restore()
    if came:
        signal.raise_signal(came[0])
        raise SystemExit(ExitStatus.RETRY)  # its handler has returned, and the block is not finished


class _LenientStream:
    """A stream that drops text it cannot write: a log on a full disk must not end a run."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def ignore_write_errors() -> None:
    """Make standard output and error of this process drop text they cannot write."""
    sys.stdout, sys.stderr = _LenientStream(sys.stdout), _LenientStream(sys.stderr)


RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def world_size() -> int:
    """Ranks of this run, by the launcher's environment; 1 without a launcher.

    Raises UserError if it names several ranks, but not this one or where they meet, or what is not a number.
    """
    found = {name: value for name in RANK_VARIABLES if (value := os.environ.get(name))}
    way_out = f"; start the ranks by a launcher, or unset {', '.join(RANK_VARIABLES)}"
    for name, value in found.items():
        if name != "MASTER_ADDR" and not (re.fullmatch("[0-9]{1,9}", value) and int(value) < 2**16):
            raise UserError(f"{name}={value}: not a number below {2**16}{way_out}")
    world, rank = int(found.get("WORLD_SIZE", 1)), int(found.get("RANK", 0))
    if rank >= world:
        raise UserError(f"RANK {rank} is not below WORLD_SIZE {world}{way_out}")
    if world > 1 and (missing := [name for name in RANK_VARIABLES if name not in found]):
        raise UserError(f"WORLD_SIZE is {world}, but {', '.join(missing)} not set{way_out}")
    return world


def end_with_parent() -> None:
    """Let this process end when the one that started it has ended, whatever ended that.

    A thread waits for the parent. The kernel's parent-death signal would watch the fork server instead, which
    lives as long as any process that it forked.
    """
    threading.Thread(target=_wait_and_end, daemon=True).start()


def _wait_and_end() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "only a child process ends with its parent"
    parent.join()
    os._exit(1)
