"""What processes that a command starts have in common."""

import multiprocessing
import os
import threading


def end_with_parent() -> None:
    """Let this process end when the one that started it has ended, whatever ended that.

    A thread waits for it: the kernel would see the end of the server that forked this process, which lives as
    long as any process of its own.
    """
    threading.Thread(target=_wait_and_end, daemon=True).start()


def _wait_and_end() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
