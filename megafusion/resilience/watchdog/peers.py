"""Exchange of heartbeats through the job's store; which ranks are silent; the reason to shut down."""

import itertools
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import suppress
from typing import TypeVar

import torch.distributed as dist

from megafusion.resilience.watchdog.failures import describe, format_ranks
from megafusion.resilience.watchdog.heartbeat import Heartbeat, LocalState

Result = TypeVar("Result")
_watchdogs = itertools.count()


class StoreUnavailable(Exception):
    """The job's store, which rank 0 hosts, does not answer; or this rank has left it."""


class Peers:
    """The last heartbeats: on rank 0 those of all ranks, on any other rank those of rank 0."""

    def __init__(self, local: LocalState):
        self._local = local
        # A connection of its own, because the main thread may block in the other one.
        store = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
        self._store: dist.Store | None = dist.PrefixStore(f"watchdog-{next(_watchdogs)}", store)
        peers = range(local.world_size) if local.rank == 0 else [0]
        self.last_heartbeats: dict[int, Heartbeat | None] = dict.fromkeys(peers)
        self._received_at = dict.fromkeys(peers, 0.0)

    def check(self) -> str | None:
        """Exchange heartbeats; returns the reason to shut down if another rank gives one."""
        local = self._local
        if self._store is not None:
            try:
                if reason := self.exchange(local.silence):
                    return reason
                if local.rank and self._has_ended(0):
                    local.left = True
                    self.exchange(local.silence)
                    self._store = None
            except StoreUnavailable as error:
                if local.left:
                    return None
                return f"rank 0, which hosts the job's store, does not answer ({error})"
        # An error that all ranks share reaches each by itself, so a rank waits before it blames another.
        failed = {r: h.end for r, h in self.last_heartbeats.items() if h and h.end not in (None, "finished")}
        if failed and (local.error or local.now - min(self._received_at[r] for r in failed) > local.silence):
            return "; ".join(f"rank {rank} has ended with {end}" for rank, end in failed.items())
        if silent := self.silent(check_processes=local.error is not None):
            return f"{format_ranks(silent)} {'does' if len(silent) == 1 else 'do'} not answer"
        if local.error and local.now - local.error_at > local.silence + 2 * local.interval:
            return f"rank {local.rank} lost its connection to another rank ({describe(local.error)})"
        return None

    def silent(self, check_processes: bool) -> list[int]:
        """Ranks without a recent heartbeat; if asked, also those whose process here is gone or stopped.

        Unless something has failed, a process that is gone may have ended well after its last heartbeat.
        """
        return [
            rank
            for rank, heartbeat in self.last_heartbeats.items()
            if rank != self._local.rank
            and not self._has_ended(rank)
            and (
                self._local.now - self._received_at[rank] >= self._local.silence
                or (check_processes and heartbeat and heartbeat.process_state())
            )
        ]

    def leave(self) -> None:
        """Announce how this rank ended. Rank 0, which hosts the store, waits until all others know."""
        others = list(self.last_heartbeats) if self._local.rank == 0 else []
        with suppress(StoreUnavailable):  # rank 0 has ended, so nobody is left to be told
            self.wait_for(others, self._local.silence, call_seconds=self._local.silence)

    def wait_for(self, ranks: Iterable[int], seconds: float, call_seconds: float) -> None:
        """Exchange heartbeats until ranks have ended or left the store. Raises StoreUnavailable."""
        deadline = time.monotonic() + seconds
        while True:
            self.exchange(call_seconds)
            heartbeats = [self.last_heartbeats[rank] for rank in ranks]
            if all(h and (h.end or h.left) for h in heartbeats) or time.monotonic() >= deadline:
                return
            time.sleep(0.05)

    def exchange(self, seconds: float, reason: str = "") -> str:
        """Write this rank's heartbeat and read the others'; returns the reason to shut down, or "".

        reason: to be written, unless another is. Raises StoreUnavailable, also if it takes longer.
        """
        store = self._store
        if store is None:
            raise StoreUnavailable
        try:
            return call_with_timeout(seconds, lambda: self._exchange(store, reason))
        except (RuntimeError, TimeoutError) as error:
            self._store = None
            raise StoreUnavailable(describe(error)) from error

    def _exchange(self, store: dist.Store, reason: str) -> str:
        if reason:
            store.compare_set("reason", "", reason)
        store.set(str(self._local.rank), self._local.heartbeat().model_dump_json())
        # Reading a key that does not exist yet would block.
        present = [r for r, last in self.last_heartbeats.items() if last or store.check([str(r)])]
        texts = store.multi_get([str(rank) for rank in present]) if present else []
        for rank, text in zip(present, texts, strict=True):
            heartbeat = Heartbeat.model_validate_json(text)
            if heartbeat != self.last_heartbeats[rank]:
                self.last_heartbeats[rank], self._received_at[rank] = heartbeat, self._local.now
        if self.last_heartbeats[0]:
            self._local.started = self.last_heartbeats[0].started
        return store.get("reason").decode() if store.check(["reason"]) else ""

    def _has_ended(self, rank: int) -> bool:
        heartbeat = self.last_heartbeats[rank]
        return heartbeat is not None and heartbeat.end is not None


def call_with_timeout(seconds: float, function: Callable[[], Result]) -> Result:
    """Call a function in a thread of its own; TimeoutError if it takes longer.

    A store whose host is stopped, or a disk that hangs, neither returns nor raises.
    """
    future: Future[Result] = Future()

    def call() -> None:
        try:
            future.set_result(function())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=call, name="watchdog-call", daemon=True).start()
    try:
        return future.result(seconds)
    except TimeoutError:
        if future.done():  # the function's own
            raise
        raise TimeoutError(f"no answer in {seconds:g} s") from None
