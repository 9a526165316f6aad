"""A pool that maps tasks over workers, in this process or in several; results are in the tasks' order."""

import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch

from data_prep.config import PreprocessConfig
from data_prep.worker import Worker, WorkerSettings
from megafusion.errors import UserError
from megafusion.processes import STOP_SIGNALS, end_with_parent

POLL_SECONDS = 0.2
_CONTEXT = multiprocessing.get_context("forkserver")
_worker: Worker


class Pool:
    """Workers for one kind of input, as a context manager: its processes end with it, or with this process.

    Each worker computes on one thread, so that results are bitwise identical at any number of workers.
    """

    def __init__(self, settings: WorkerSettings, num_workers: int):
        self._settings, self._executor = settings, None
        if num_workers > 1:
            _CONTEXT.set_forkserver_preload(_preload(settings.config))
            self._counter, next_index = _CONTEXT.Value("q", 0), _CONTEXT.Value("i", 0)
            before = set(multiprocessing.active_children())
            self._executor = ProcessPoolExecutor(
                num_workers, _CONTEXT, _start_worker, (settings, self._counter, next_index)
            )
            self._started = lambda: set(multiprocessing.active_children()) - before
        else:
            self._num_threads = torch.get_num_threads()
            self._num_done = 0
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
        """Results of a Worker's method for each task, in order. `report` receives the records done so far."""
        self._report = report
        if self._executor is None:
            self._num_done = 0
            yield from map(getattr(self._worker, method), tasks)
            return
        with self._counter.get_lock():
            self._counter.value = 0
        try:
            for future in [self._executor.submit(_call, method, task) for task in tasks]:
                yield self._result(future)
        except BrokenProcessPool as error:
            raise UserError(
                "a preprocessing worker died; if memory ran out, lower num_workers or batch_size; run the "
                "same command to resume"
            ) from error
        report(self._counter.value)

    def _result(self, future: Future) -> Any:
        while not wait([future], POLL_SECONDS, FIRST_COMPLETED).done:
            self._report(self._counter.value)
        return future.result()

    def _count(self, number: int) -> None:
        self._num_done += number
        self._report(self._num_done)


def _preload(config: PreprocessConfig) -> list[str]:
    """Modules that the workers are forked with, of every kind of input: the server starts once.

    diffusers' autoencoders take 6 s of processor time, once instead of in each worker. With GPUs each worker
    imports them: they may ask for a device there, and no process that is forked afterwards could use one.
    """
    encodes = config.image_storage == "latents" and (config.images or config.documents)
    modules = ["data_prep.worker"]
    if encodes and not torch.cuda.device_count():
        modules.append("diffusers.models.autoencoders")
    return modules


def _start_worker(settings: WorkerSettings, counter: Any, next_index: Any) -> None:
    """Initialize a worker process. It ends with its parent, however that ends, and leaves signals to it."""
    global _worker
    for number in set(STOP_SIGNALS) - {signal.SIGTERM}:  # by which the executor ends it
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()
    torch.set_num_threads(1)
    with next_index.get_lock():
        index = next_index.value
        next_index.value += 1

    def count(more: int) -> None:
        with counter.get_lock():
            counter.value += more

    _worker = Worker(settings, index, count)


def _call(method: str, task: Any) -> Any:
    return getattr(_worker, method)(task)


class Throughput:
    """Records per second since it was made, as text."""

    def __init__(self, unit: str):
        self._unit, self._started = unit, time.monotonic()

    def __call__(self, number: int) -> str:
        return f"{number / max(time.monotonic() - self._started, 1e-3):,.0f} {self._unit}/s"
