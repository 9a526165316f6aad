"""One function over many tasks: here, or in processes; results in the tasks' order."""

import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch

from data_prep.worker import Worker, WorkerSettings
from megafusion.errors import UserError
from megafusion.processes import end_with_parent

POLL_SECONDS = 0.2
_CONTEXT = multiprocessing.get_context("forkserver")
_worker: Worker


class Pool:
    """Workers for one kind of input. A context: its processes end with it, or with this process.

    Each computes on one thread, so that results are the same bits however many there are.
    """

    def __init__(self, settings: WorkerSettings, num_workers: int):
        self._settings, self._executor = settings, None
        if num_workers > 1:
            _CONTEXT.set_forkserver_preload(["data_prep.worker"])
            self._counter, number = _CONTEXT.Value("q", 0), _CONTEXT.Value("i", 0)
            before = set(multiprocessing.active_children())
            self._executor = ProcessPoolExecutor(
                num_workers, _CONTEXT, _begin, (settings, self._counter, number)
            )
            self._started = lambda: set(multiprocessing.active_children()) - before
        else:
            self._num_threads = torch.get_num_threads()
            self._done = 0
            self._worker = Worker(settings, 0, self._count)

    def __enter__(self) -> "Pool":
        if self._executor is None:
            torch.set_num_threads(1)
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if self._executor is None:
            torch.set_num_threads(self._num_threads)
            return
        if kind is not None:
            for process in self._started():
                process.kill()
        self._executor.shutdown(cancel_futures=True)

    def map(self, method: str, tasks: Sequence[Any], report: Callable[[int], None]) -> Iterator[Any]:
        """What a Worker's method makes of each task, in order. `report` gets the records done so far."""
        self._report = report
        if self._executor is None:
            self._done = 0
            yield from map(getattr(self._worker, method), tasks)
            return
        with self._counter.get_lock():
            self._counter.value = 0
        try:
            for future in [self._executor.submit(_call, method, task) for task in tasks]:
                yield self._result(future)
        except BrokenProcessPool as error:
            raise UserError(
                "a process that preprocesses has died; if memory ran out, lower num_workers or batch_size; "
                "start again to go on"
            ) from error
        report(self._counter.value)

    def _result(self, future: Future) -> Any:
        while not wait([future], POLL_SECONDS, FIRST_COMPLETED).done:
            self._report(self._counter.value)
        return future.result()

    def _count(self, number: int) -> None:
        self._done += number
        self._report(self._done)


def _begin(settings: WorkerSettings, counter: Any, number: Any) -> None:
    """A worker ends with the process that began it, whatever ends that, and leaves Ctrl-C to it."""
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
    torch.set_num_threads(1)
    with number.get_lock():
        own = number.value
        number.value += 1

    def count(more: int) -> None:
        with counter.get_lock():
            counter.value += more

    _worker = Worker(settings, own, count)


def _call(method: str, task: Any) -> Any:
    try:
        return getattr(_worker, method)(task)
    except UserError as error:
        raise UserError(str(error)) from None  # a subclass may not travel


class Speed:
    """Records a second since it was made, as text."""

    def __init__(self, what: str):
        self._what, self._begun = what, time.monotonic()

    def __call__(self, number: int) -> str:
        return f"{number / max(time.monotonic() - self._begun, 1e-3):,.0f} {self._what}/s"
