"""Calls with a timeout."""

import queue
import threading
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


def call_with_timeout(seconds: float, function: Callable[[], Result]) -> Result:
    """Call a function in a thread of its own; TimeoutError if it takes longer.

    A store whose host is stopped, or a disk that hangs, neither returns nor raises.
    """
    results: queue.SimpleQueue = queue.SimpleQueue()

    def call() -> None:
        try:
            results.put((function(), None))
        except Exception as error:
            results.put((None, error))

    threading.Thread(target=call, name="watchdog-call", daemon=True).start()
    try:
        result, error = results.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer in {seconds:g} s") from None
    if error is not None:
        raise error
    return result
