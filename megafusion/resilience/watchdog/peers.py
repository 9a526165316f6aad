"""The exchange of heartbeats through the job's store: who is heard, who is silent, the verdict, parting."""

import itertools
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch.distributed as dist

from megafusion.resilience.watchdog.deadline import call_with_timeout
from megafusion.resilience.watchdog.failures import describe
from megafusion.resilience.watchdog.heartbeat import Heartbeat, LocalState
from megafusion.resilience.watchdog.report import ranks_in_words

_watchdogs = itertools.count()


class StoreUnavailable(Exception):
    """The job's store, and rank 0, which keeps it, do not answer; or this rank needs it no more."""


class Peers:
    """What a rank hears: rank 0 of every rank, itself too, and each other rank of rank 0.

    interval_seconds: between two exchanges. silence_seconds: a rank without a heartbeat for so long is lost.
    """

    def __init__(self, here: LocalState, interval_seconds: float, silence_seconds: float):
        self._here, self._interval, self._silence = here, interval_seconds, silence_seconds
        # A connection of its own: the main thread may block in the other one.
        store = dist.distributed_c10d._get_default_store().clone()
        self._store: dist.Store | None = dist.PrefixStore(f"watchdog-{next(_watchdogs)}", store)
        peers = range(here.world) if here.rank == 0 else [0]
        self.last_heartbeats: dict[int, Heartbeat | None] = dict.fromkeys(peers)
        self._heard_at = dict.fromkeys(peers, 0.0)

    def reason(self) -> str | None:
        """Exchange heartbeats; why the run has to end, if others are why."""
        here = self._here
        if self._store is not None:
            try:
                if verdict := self.ask(self._silence, self._exchange):
                    return verdict
                if here.rank and self._has_ended(0):
                    here.left = True
                    self.ask(self._silence, self._exchange)
                    self._store = None
            except StoreUnavailable as error:
                return (
                    None if here.left else f"rank 0, which keeps the job's store, does not answer ({error})"
                )
        # A failure that all share reaches each of them by itself, so the others are given time.
        failed = {r: h.end for r, h in self.last_heartbeats.items() if h and h.end not in (None, "finished")}
        if failed and (here.error or here.now - min(self._heard_at[r] for r in failed) > self._silence):
            return "; ".join(f"rank {rank} has ended with {end}" for rank, end in failed.items())
        if silent := self.silent(look_at_processes=here.error is not None):
            return f"{ranks_in_words(silent)} {'does' if len(silent) == 1 else 'do'} not answer"
        if here.error and here.now - here.error_at > self._silence + 2 * self._interval:
            return f"rank {here.rank} lost its connection to another rank ({describe(here.error)})"
        return None

    def silent(self, look_at_processes: bool) -> list[int]:
        """Ranks whose heartbeat is missing; if asked, also those of this machine that are gone or stopped.

        Without a reason to look, a process that is gone may be one that has ended well since it was heard.
        """
        return [
            rank
            for rank, heartbeat in self.last_heartbeats.items()
            if rank != self._here.rank
            and not self._has_ended(rank)
            and (
                self._here.now - self._heard_at[rank] >= self._silence
                or (look_at_processes and heartbeat and heartbeat.process_state())
            )
        ]

    def tell(self, reason: str, seconds: float) -> None:
        """Write the verdict unless there is one, and exchange heartbeats. Raises NoStore."""
        self.ask(seconds, lambda store: store.compare_set("verdict", "", reason))
        self.ask(seconds, self._exchange)

    def part(self) -> None:
        """Tell the others how this rank ended; rank 0 waits until they know: its end may be the store's."""
        deadline = time.monotonic() + self._silence
        with suppress(StoreUnavailable):  # rank 0 has ended before: nobody is left to be told
            self.ask(self._silence, self._exchange)
            while self._here.rank == 0 and time.monotonic() < deadline:
                if all(h and (h.end or h.left) for h in self.last_heartbeats.values()):
                    return
                time.sleep(0.05)
                self.ask(self._silence, self._exchange)

    def ask(self, seconds: float, function: Callable[[dist.Store], Any]) -> Any:
        """What a function of the store returns. Raises NoStore, also where that takes longer."""
        store = self._store
        if store is None:
            raise StoreUnavailable
        try:
            return call_with_timeout(seconds, lambda: function(store))
        except (RuntimeError, TimeoutError) as error:
            self._store = None
            raise StoreUnavailable(describe(error)) from error

    def _exchange(self, store: dist.Store) -> str | None:
        """Write this rank's heartbeat, read the others'; the verdict, if some rank has written one."""
        store.set(str(self._here.rank), self._here.heartbeat().to_json())
        # A key that is not there yet would be waited for.
        there = [
            rank
            for rank, last_heartbeats in self.last_heartbeats.items()
            if last_heartbeats or store.check([str(rank)])
        ]
        texts = store.multi_get([str(rank) for rank in there]) if there else []
        for rank, text in zip(there, texts, strict=True):
            heartbeat = Heartbeat.from_json(text)
            if heartbeat != self.last_heartbeats[rank]:
                self.last_heartbeats[rank], self._heard_at[rank] = heartbeat, self._here.now
        if self.last_heartbeats[0]:
            self._here.started = self.last_heartbeats[0].started
        return store.get("verdict").decode() if store.check(["verdict"]) else None

    def _has_ended(self, rank: int) -> bool:
        heartbeat = self.last_heartbeats[rank]
        return heartbeat is not None and heartbeat.end is not None
