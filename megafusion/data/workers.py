"""Processes that make shares of batches ahead: torch's DataLoader, each worker with a maker of its own."""

import multiprocessing
import signal
import weakref
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from multiprocessing import forkserver
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from megafusion.errors import UserError
from megafusion.processes import STOP_SIGNALS, end_with_parent

# Not forked from this process: a trainer has threads (NCCL's, those that save), and a lock that one of them
# holds at a fork stays locked in the copy. The server has none, and loads what its workers need once.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["megafusion.data.loader"])


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

    makers: picklable. The processes end with `close`, or with this process however it ends.
    """

    def __init__(self, makers: Sequence[Callable[[int], Any]], first: int, prefetch: int):
        self._num = len(makers)
        _start_server()
        loader = DataLoader(
            _Ahead(makers, first),
            batch_size=None,
            num_workers=self._num,
            prefetch_factor=prefetch,
            collate_fn=_as_it_is,
            worker_init_fn=_begin,
            multiprocessing_context=_CONTEXT,
            generator=torch.Generator(),  # or it would draw from the global one
        )
        self._parts = iter(loader)
        # Python ends such processes with SIGTERM, to which these are deaf.
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


def _start_server() -> None:
    """Begin the server of processes, if there is none, deaf to what a queue or a terminal sends to all: its
    end would be the workers'. This process is deaf too for those milliseconds.
    """
    heard = {number: signal.signal(number, signal.SIG_IGN) for number in STOP_SIGNALS}
    forkserver.ensure_running()
    for number, handler in heard.items():
        signal.signal(number, handler)


def _as_it_is(made: Any) -> Any:
    return made


def _begin(number: int) -> None:
    """A worker ends with the process that reads, whatever ends that, and leaves signals to it."""
    for signal_number in STOP_SIGNALS:
        signal.signal(signal_number, signal.SIG_IGN)
    end_with_parent()
