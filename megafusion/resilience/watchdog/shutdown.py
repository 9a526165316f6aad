"""Shutdown of a run that cannot continue: reason to all ranks, stacks, one message, exit."""

import os
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from megafusion.resilience.exit_status import ExitStatus
from megafusion.resilience.watchdog.deadline import call_with_timeout
from megafusion.resilience.watchdog.heartbeat import Heartbeat, LocalState
from megafusion.resilience.watchdog.peers import Peers, StoreUnavailable
from megafusion.resilience.watchdog.report import format_location, format_report
from megafusion.resilience.watchdog.stacks import format_stacks
from megafusion.storage import write_file


def shut_down(
    reason: str, local: LocalState, peers: Peers, folder: Path, interval_seconds: float
) -> NoReturn:
    """Exit this process and make the others exit, with their stacks in the folder and one message."""

    def run() -> None:
        try:
            shut_down_rank = _shut_down_rank_0 if local.rank == 0 else _shut_down_other
            shut_down_rank(reason, local, peers, folder, interval_seconds)
        except Exception:
            os.write(2, traceback.format_exc().encode())

    try:
        # A disk or a store that hangs, perhaps the fault itself, must not keep the process alive.
        call_with_timeout(10 * interval_seconds, run)
    finally:
        os._exit(ExitStatus.RETRY)


def _shut_down_rank_0(
    reason: str, local: LocalState, peers: Peers, folder: Path, interval_seconds: float
) -> None:
    """Wait until every rank that answers has dumped its stacks, and report."""
    silent = peers.silent(check_processes=True)
    dumped = [
        f"dumped-{r}" for r, h in peers.last_heartbeats.items() if r and r not in silent and not (h and h.end)
    ]
    with suppress(StoreUnavailable):
        peers.announce(reason, interval_seconds)
        deadline = time.monotonic() + 2 * interval_seconds
        while dumped and time.monotonic() < deadline:
            if peers.call_store(interval_seconds, lambda store: store.check(dumped)):
                break
            time.sleep(0.1)
        peers.announce(reason, interval_seconds)  # and read the final heartbeats
    _publish(format_report(reason, peers.last_heartbeats, silent, folder), folder, local, interval_seconds)
    _dump_stacks(reason, local, folder)


def _shut_down_other(
    reason: str, local: LocalState, peers: Peers, folder: Path, interval_seconds: float
) -> None:
    """Wait for rank 0's report, or write one from the dumped stacks if it does not come."""
    wait_seconds = 4 * interval_seconds
    try:
        peers.announce(reason, interval_seconds)
    except StoreUnavailable:
        wait_seconds = interval_seconds + 1  # for the other ranks to dump their stacks
    _dump_stacks(reason, local, folder)
    with suppress(StoreUnavailable):
        peers.call_store(interval_seconds, lambda store: store.set(f"dumped-{local.rank}", "yes"))
    deadline = time.monotonic() + wait_seconds
    while not _report_file(folder, local).exists() and time.monotonic() <= deadline:
        time.sleep(0.1)
    dumped = _read_heartbeats(folder, local.started)
    heartbeats = dict.fromkeys(range(local.world_size)) | peers.last_heartbeats | dumped
    silent = [rank for rank, h in heartbeats.items() if rank not in dumped and not (h and h.end)]
    _publish(format_report(reason, heartbeats, silent, folder), folder, local, interval_seconds)


def _publish(message: str, folder: Path, local: LocalState, seconds: float) -> None:
    """Print the message, unless another rank has: the first one creates the file.

    A disk that fails or hangs does not delay it, nor does a progress bar that holds sys.stderr.
    """

    def create() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with _report_file(folder, local).open("x") as file:
            file.write(message)

    try:
        call_with_timeout(seconds, create)
    except FileExistsError:
        return
    except OSError:  # including TimeoutError
        pass
    os.write(2, f"\n{message}".encode())


def _report_file(folder: Path, local: LocalState) -> Path:
    return folder / f"report-{local.started}.txt"


def _dump_stacks(reason: str, local: LocalState, folder: Path) -> None:
    heartbeat = local.heartbeat()
    lines = [f"rank {local.rank}: {format_location(heartbeat)}", heartbeat.to_json(), reason, ""]
    if local.error:
        lines += traceback.format_exception(local.error)
    lines += format_stacks(local.training_thread)
    with suppress(OSError):  # a full disk does not hold the message back
        write_file(folder / f"rank-{local.rank:05}.txt", "\n".join(line.rstrip("\n") for line in lines))


def _read_heartbeats(folder: Path, started: str) -> dict[int, Heartbeat]:
    """Heartbeats of the ranks that have dumped their stacks in this incident."""
    found = {}
    for path in sorted(folder.glob("rank-*.txt")):
        heartbeat = Heartbeat.from_json(path.read_text().splitlines()[1])
        if heartbeat.started == started:
            found[int(path.stem.removeprefix("rank-"))] = heartbeat
    return found
