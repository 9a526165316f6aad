"""A call that must not keep its caller."""

import queue
import threading
from collections.abc import Callable
from typing import TypeVar

Answer = TypeVar("Answer")


def call_with_timeout(seconds: float, function: Callable[[], Answer]) -> Answer:
    """What the function returns or raises, from a thread of its own; TimeoutError where that takes longer.

    A store whose keeper is stopped, or a disk that hangs, answers nothing and raises nothing.
    """
    answers: queue.SimpleQueue = queue.SimpleQueue()

    def call() -> None:
        try:
            answers.put((function(), None))
        except Exception as error:
            answers.put((None, error))

    threading.Thread(target=call, name="watchdog-call", daemon=True).start()
    try:
        answer, error = answers.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer in {seconds:g} s") from None
    if error is not None:
        raise error
    return answer
