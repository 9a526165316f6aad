"""The end of a run that cannot go on: the verdict to all ranks, stacks, one message, exit."""

import os
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from megafusion.resilience.watchdog.deadline import call_with_timeout
from megafusion.resilience.watchdog.heartbeat import Heartbeat, LocalState
from megafusion.resilience.watchdog.peers import Peers, StoreUnavailable
from megafusion.resilience.watchdog.report import EXIT_STATUS, place_in_words, report
from megafusion.resilience.watchdog.stacks import format_stacks
from megafusion.storage import write_file


def end_run(reason: str, here: LocalState, others: Peers, folder: Path, interval_seconds: float) -> NoReturn:
    """End this process, and see to it that all end, with their stacks in the folder and one message."""

    def end() -> None:
        try:
            (_end_first if here.rank == 0 else _end_other)(reason, here, others, folder, interval_seconds)
        except Exception:
            os.write(2, traceback.format_exc().encode())

    try:
        # A disk or a store that hangs, which may be what is wrong, must not keep the process.
        call_with_timeout(10 * interval_seconds, end)
    finally:
        os._exit(EXIT_STATUS)


def _end_first(reason: str, here: LocalState, others: Peers, folder: Path, interval_seconds: float) -> None:
    """Rank 0 waits until every rank that answers has written where it is, and reports."""
    silent = others.silent(look_at_processes=True)
    told = [
        f"told-{r}" for r, h in others.last_heartbeats.items() if r and r not in silent and not (h and h.end)
    ]
    with suppress(StoreUnavailable):
        others.tell(reason, interval_seconds)
        deadline = time.monotonic() + 2 * interval_seconds
        while told and time.monotonic() < deadline:
            if others.ask(interval_seconds, lambda store: store.check(told)):
                break
            time.sleep(0.1)
        others.tell(reason, interval_seconds)  # and hear where they are
    _publish(report(reason, others.last_heartbeats, silent, folder), folder, here, interval_seconds)
    _write_stacks(reason, here, folder)


def _end_other(reason: str, here: LocalState, others: Peers, folder: Path, interval_seconds: float) -> None:
    """Any other rank waits for rank 0's message, or writes it where that does not come."""
    patience_seconds = 4 * interval_seconds
    try:
        others.tell(reason, interval_seconds)
    except StoreUnavailable:
        patience_seconds = interval_seconds + 1  # for the other ranks to come here
    _write_stacks(reason, here, folder)
    with suppress(StoreUnavailable):
        others.ask(interval_seconds, lambda store: store.set(f"told-{here.rank}", "yes"))
    deadline = time.monotonic() + patience_seconds
    while not _report_file(folder, here).exists():
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    written = _written(folder, here.started)
    last_heartbeats = dict.fromkeys(range(here.world)) | others.last_heartbeats | written
    silent = [rank for rank, h in last_heartbeats.items() if rank not in written and not (h and h.end)]
    _publish(report(reason, last_heartbeats, silent, folder), folder, here, interval_seconds)


def _publish(message: str, folder: Path, here: LocalState, seconds: float) -> None:
    """Print the message unless another rank has: the one that makes the file.

    A disk that refuses or hangs does not keep it back, nor a progress bar that has sys.stderr in hand.
    """

    def create() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with _report_file(folder, here).open("x") as file:
            file.write(message)

    try:
        call_with_timeout(seconds, create)
    except FileExistsError:
        return
    except OSError:  # TimeoutError is one
        pass
    os.write(2, f"\n{message}".encode())


def _report_file(folder: Path, here: LocalState) -> Path:
    return folder / f"report-{here.started}.txt"


def _write_stacks(reason: str, here: LocalState, folder: Path) -> None:
    heartbeat = here.heartbeat()
    lines = [f"rank {here.rank}: {place_in_words(heartbeat)}", heartbeat.to_json(), reason, ""]
    if here.error:
        lines += traceback.format_exception(here.error)
    lines += format_stacks(here.thread)
    with suppress(OSError):  # a disk that refuses does not keep the message back
        write_file(folder / f"rank-{here.rank:05}.txt", "\n".join(line.rstrip("\n") for line in lines))


def _written(folder: Path, started: str) -> dict[int, Heartbeat]:
    """Where the ranks are that wrote their stacks in this incident."""
    found = {}
    for path in sorted(folder.glob("rank-*.txt")):
        heartbeat = Heartbeat.from_json(path.read_text().splitlines()[1])
        if heartbeat.started == started:
            found[int(path.stem.removeprefix("rank-"))] = heartbeat
    return found
