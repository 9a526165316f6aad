"""Worker processes that build batches ahead: torch's DataLoader with a builder of its own for each worker."""

import multiprocessing
import signal
import weakref
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from multiprocessing import forkserver
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from megafusion.errors import UserError
from megafusion.processes import STOP_SIGNALS, end_with_parent

# Not forked from this process: a trainer has threads (NCCL's, the checkpoint writer), and a lock that one of
# them holds during a fork stays locked in the child. The fork server has no threads, and imports once.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["megafusion.data.loader"])


class _Batches(IterableDataset):
    """The batches that this worker's builder returns, one after another."""

    def __init__(self, builders: Sequence[Callable[[int], Any]], first_batch: int):
        self._builders, self._first_batch = builders, first_batch

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        assert worker is not None, "iterated in a worker process alone"
        build = self._builders[worker.id]
        for batch_number in count(self._first_batch):
            try:
                built = build(batch_number)
            except UserError as error:
                yield error
                return
            yield built


class Workers:
    """Processes that call a builder each for batch after batch, at most `prefetch` batches ahead.

    builders: picklable. The processes end with `close`, or when this process ends for any reason.
    """

    def __init__(self, builders: Sequence[Callable[[int], Any]], first_batch: int, prefetch: int):
        self._num_workers = len(builders)
        _start_fork_server()
        loader = DataLoader(
            _Batches(builders, first_batch),
            batch_size=None,
            num_workers=self._num_workers,
            prefetch_factor=prefetch,
            collate_fn=_identity,
            worker_init_fn=_initialize_worker,
            multiprocessing_context=_CONTEXT,
            generator=torch.Generator(),  # otherwise it samples from the global one
        )
        self._iterator: Any = iter(loader)
        # Python ends such processes by SIGTERM, which these ignore.
        self._end = weakref.finalize(self, _kill, list(self._iterator._workers))  # type: ignore[attr-defined]

    def next(self) -> list[Any]:
        """Each worker's part of the next batch. Re-raises a worker's UserError."""
        try:
            parts = [next(self._iterator) for _ in range(self._num_workers)]
        except RuntimeError as error:
            self.close()
            if "DataLoader worker" not in str(error) or "exited" not in str(error) + str(error.__cause__):
                raise
            raise UserError(
                f"a data worker process has died ({error}); if memory ran out, lower data.num_workers or "
                "data.prefetch"
            ) from error
        for part in parts:
            if isinstance(part, UserError):
                self.close()
                raise part
        return parts

    def close(self) -> None:
        """End the processes and wait for them."""
        self._iterator._shutdown_workers()
        self._end()


def _kill(processes: list) -> None:
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join()


def _start_fork_server() -> None:
    """Start the fork server, unless it runs, ignoring the signals that a queue or terminal sends to all.

    If it ended by one, so would the workers. This process ignores them too for these milliseconds.
    """
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in STOP_SIGNALS}
    forkserver.ensure_running()
    for number, handler in handlers.items():
        signal.signal(number, handler)


def _identity(built: Any) -> Any:
    return built


def _initialize_worker(index: int) -> None:
    """Leave stop signals to the trainer, and end with it however it ends."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()
