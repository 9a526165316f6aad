"""Signals and lifetime of the processes that a command starts."""

import multiprocessing
import os
import signal
import threading

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Requests to stop, from Ctrl-C, a queue or a launcher. The trainer handles them, its worker processes ignore
them."""


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
