"""Shutdown of a run that cannot continue: reason to all ranks, stacks, one message, exit."""

import os
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from megafusion.errors import ExitStatus
from megafusion.resilience.watchdog.failures import format_ranks
from megafusion.resilience.watchdog.heartbeat import Heartbeat, LocalState
from megafusion.resilience.watchdog.peers import Peers, StoreUnavailable, call_with_timeout
from megafusion.resilience.watchdog.stacks import format_stacks
from megafusion.storage import write_file


def shut_down(reason: str, local: LocalState, peers: Peers) -> NoReturn:
    """Exit this process and make the others exit, with their stacks in the folder and one message."""
    shut_down_rank = _shut_down_rank_0 if local.rank == 0 else _shut_down_other
    try:
        # A disk or a store that hangs, perhaps the fault itself, must not keep the process alive.
        with suppress(TimeoutError):
            call_with_timeout(10 * local.interval, lambda: shut_down_rank(reason, local, peers))
    except Exception:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(ExitStatus.RETRY)


def _shut_down_rank_0(reason: str, local: LocalState, peers: Peers) -> None:
    """Wait until every rank that answers has dumped its stacks, and report."""
    silent = peers.silent(check_processes=True)
    answering = [rank for rank in peers.last_heartbeats if rank and rank not in silent]
    with suppress(StoreUnavailable):
        peers.exchange(local.interval, reason)
        peers.wait_for(answering, 2 * local.interval, call_seconds=local.interval)
    _publish(format_report(reason, peers.last_heartbeats, silent, local.folder), local)
    _dump_stacks(reason, local)


def _shut_down_other(reason: str, local: LocalState, peers: Peers) -> None:
    """Wait for rank 0's report, or write one from the dumped stacks if it does not come."""
    deadline = time.monotonic() + 5 * local.interval
    try:
        peers.exchange(local.interval, reason)
        _dump_stacks(reason, local)
        local.left = True
        peers.exchange(local.interval)
    except StoreUnavailable:
        _dump_stacks(reason, local)
        deadline = time.monotonic() + local.interval + 1  # for the other ranks to dump their stacks
    while not _report_file(local).exists() and time.monotonic() <= deadline:
        time.sleep(0.1)
    dumped = _read_heartbeats(local)
    heartbeats = dict.fromkeys(range(local.world_size)) | peers.last_heartbeats | dumped
    silent = [rank for rank, h in heartbeats.items() if rank not in dumped and not (h and h.end)]
    _publish(format_report(reason, heartbeats, silent, local.folder), local)


def format_report(
    reason: str, last_heartbeats: dict[int, Heartbeat | None], silent: list[int], folder: Path
) -> str:
    """The reason, then for each rank where it is. silent: ranks that do not answer. folder: of the stacks."""
    all_run = not silent and all(h and not h.end for h in last_heartbeats.values())
    any_waits = all_run and any(h and h.waits for h in last_heartbeats.values())
    states: dict[str, list[int]] = {}
    for rank, heartbeat in last_heartbeats.items():
        if heartbeat is None:
            text = "no heartbeat: killed, stopped or disconnected"
        elif rank in silent:
            state = heartbeat.process_state()
            text = f"its process is {state}" if state else "no heartbeat: killed, stopped or disconnected"
            text += f"; last seen at {heartbeat.location}"
        elif heartbeat.end:
            text = f"has ended: {heartbeat.end}"
        else:
            text = heartbeat.location
            if any_waits and not heartbeat.waits:
                text = f"in no collective while others wait, so look there first: {text}"
        states.setdefault(text, []).append(rank)
    lines = [f"megafusion: {reason}. Every process exits with status {ExitStatus.RETRY}."]
    lines += [f"  {format_ranks(ranks)}: {text}" for text, ranks in states.items()]
    return "\n".join([*lines, f"  stacks: {folder}/rank-*.txt", ""])


def _publish(message: str, local: LocalState) -> None:
    """Print the message, unless another rank has: the first one creates the file.

    A disk that fails or hangs does not delay it, nor does a progress bar that holds sys.stderr.
    """

    def create() -> None:
        local.folder.mkdir(parents=True, exist_ok=True)
        with _report_file(local).open("x") as file:
            file.write(message)

    try:
        call_with_timeout(local.interval, create)
    except FileExistsError:
        return
    except OSError:  # including TimeoutError
        pass
    os.write(2, f"\n{message}".encode())


def _report_file(local: LocalState) -> Path:
    return local.folder / f"report-{local.started}.txt"


def _dump_stacks(reason: str, local: LocalState) -> None:
    heartbeat = local.heartbeat()
    lines = [f"rank {local.rank}: {heartbeat.location}", heartbeat.model_dump_json(), reason, ""]
    if local.error:
        lines += traceback.format_exception(local.error)
    lines += format_stacks(local.training_thread)
    with suppress(OSError):  # a full disk does not hold the message back
        write_file(local.folder / f"rank-{local.rank:05}.txt", "\n".join(line.rstrip("\n") for line in lines))


def _read_heartbeats(local: LocalState) -> dict[int, Heartbeat]:
    """Heartbeats of the ranks that have dumped their stacks in this incident."""
    found = {}
    for path in sorted(local.folder.glob("rank-*.txt")):
        heartbeat = Heartbeat.model_validate_json(path.read_text().splitlines()[1])
        if heartbeat.started == local.started:
            found[int(path.stem.removeprefix("rank-"))] = heartbeat
    return found
