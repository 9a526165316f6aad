"""Processes that make shares of batches ahead: torch's DataLoader, each worker with a maker of its own."""

import ctypes
import os
import signal
import weakref
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from megafusion.errors import UserError
from megafusion.health.signals import ignore_stop_signals

PR_SET_PDEATHSIG = 1


class _Refused(NamedTuple):
    """What a worker's UserError says: a message travels between processes, any exception may not."""

    message: str


class _Ahead(IterableDataset):
    def __init__(self, makers: Sequence[Callable[[int], Any]], first: int):
        self._makers, self._first = makers, first

    def __iter__(self) -> Iterator[Any]:
        make = self._makers[get_worker_info().id]
        for number in count(self._first):
            try:
                made = make(number)
            except UserError as error:
                yield _Refused(str(error))
                return
            yield made


class Workers:
    """Processes that call makers for batch after batch, at most `prefetch` batches ahead.

    They begin as copies of this process (fork), and end with `close`, or with this process however it ends.
    """

    def __init__(self, makers: Sequence[Callable[[int], Any]], first: int, prefetch: int):
        self._num = len(makers)
        loader = DataLoader(
            _Ahead(makers, first),
            batch_size=None,
            num_workers=self._num,
            prefetch_factor=prefetch,
            collate_fn=_as_it_is,
            worker_init_fn=_begin,
            multiprocessing_context="fork",
            generator=torch.Generator(),  # or it would draw from the global one
        )
        self._parts = iter(loader)
        # Python ends such processes with SIGTERM, which these leave to their parent.
        self._end = weakref.finalize(self, _kill, list(self._parts._workers))

    def next(self) -> list[Any]:
        """What each worker has made of the next batch. Raises UserError as a worker did."""
        try:
            parts = [next(self._parts) for _ in range(self._num)]
        except RuntimeError as error:
            self.close()
            if "DataLoader worker" not in str(error) or "exited" not in str(error) + str(error.__cause__):
                raise
            raise UserError(
                f"a process that reads data has died ({error}); if memory ran out, lower data.num_workers or "
                "data.prefetch"
            ) from error
        for part in parts:
            if isinstance(part, _Refused):
                self.close()
                raise UserError(part.message)
        return parts

    def close(self) -> None:
        """End the processes and wait for them."""
        self._parts._shutdown_workers()
        self._end()


def _kill(processes: list) -> None:
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join()


def _as_it_is(made: Any) -> Any:
    return made


def _begin(number: int) -> None:
    """The kernel ends a worker with its parent, whatever ends that; signals are the parent's to handle."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ignore_stop_signals()
    if os.getppid() == 1:
        os._exit(1)
