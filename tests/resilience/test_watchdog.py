"""A run that hangs or loses a rank shuts down on every rank, with a message that names rank and line."""

import ctypes
import multiprocessing
import os
import re
import signal
import socket
import threading
import time
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from megafusion.engine.process_group import start_process_group
from megafusion.errors import ExitStatus, UserError
from megafusion.parallel.errors import raise_on_all_ranks
from megafusion.resilience.watchdog.failures import format_ranks
from megafusion.resilience.watchdog.heartbeat import LocalState
from megafusion.resilience.watchdog.shutdown import _dump_stacks, _publish
from megafusion.resilience.watchdog.thread import Watchdog
from tests.support.marks import full

SILENCE_SECONDS = 3.0


def join_collective(rank: int, watchdog: Watchdog) -> None:
    for step in range(3):
        watchdog.beat(step, "train")
        with raise_on_all_ranks():
            pass


def compute(rank: int, watchdog: Watchdog) -> None:
    while True:
        sum(range(1000))
        time.sleep(0.001)  # the suite runs on two cores


def signal_itself(
    rank: int, watchdog: Watchdog, culprit: int, number: signal.Signals, mark: Path, others=join_collective
) -> None:
    join_collective(rank, watchdog)
    if rank == culprit:
        time.sleep(1)  # until the others wait in a collective
        mark.touch()
        os.kill(os.getpid(), number)
    others(rank, watchdog)


def read_forever() -> None:
    time.sleep(300)


def never_join(rank: int, watchdog: Watchdog, culprit: int) -> None:
    join_collective(rank, watchdog)
    if rank == culprit:
        read_forever()
    join_collective(rank, watchdog)


def wait_for_a_handle(rank: int, watchdog: Watchdog) -> None:
    join_collective(rank, watchdog)
    group = dist.new_group(timeout=timedelta(seconds=60))  # longer than the watchdog's
    if rank == 1:
        read_forever()
    handle = dist.all_reduce(torch.ones(1), group=group, async_op=True)
    handle.wait()


def hold_the_gil(rank: int, watchdog: Watchdog, culprit: int) -> None:
    if rank == culprit:
        ctypes.PyDLL(None).sleep(300)  # holds the GIL, so no other thread runs
    join_collective(rank, watchdog)


def stop_together(rank: int, watchdog: Watchdog, folder: Path, seconds: float) -> None:
    """All ranks stop, as at Ctrl-Z, and continue together."""
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    join_collective(rank, watchdog)
    if rank == 0 and os.fork() == 0:
        time.sleep(seconds)
        for path in folder.glob("pid-*"):
            os.kill(int(path.read_text()), signal.SIGCONT)
        os._exit(0)
    os.kill(os.getpid(), signal.SIGSTOP)
    join_collective(rank, watchdog)


def end_one_after_another(rank: int, watchdog: Watchdog, mark: Path) -> None:
    """Rank 0 ends first; the others end later, and only when its process has."""
    if rank == 0:
        mark.write_text(str(os.getpid()))
    join_collective(rank, watchdog)
    while rank and psutil.pid_exists(int(mark.read_text())):
        time.sleep(0.05)
    time.sleep(0.5 * rank)


def fail_alone(rank: int, watchdog: Watchdog, culprit: int, error: BaseException) -> None:
    join_collective(rank, watchdog)
    if rank == culprit:
        raise error
    join_collective(rank, watchdog)


def raise_together(rank: int, watchdog: Watchdog) -> None:
    with raise_on_all_ranks():
        if rank == 1:
            raise UserError("no such shards")


def run_rank(
    rank: int,
    world: int,
    port: int,
    folder: Path,
    timeout_seconds: float,
    silence_seconds: float,
    behave,
    arguments,
) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), GLOO_SOCKET_IFNAME="lo")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.dup2(os.open(folder / f"stderr-{rank}", os.O_CREAT | os.O_WRONLY), 2)
    start_process_group(timeout_seconds)
    try:
        with Watchdog(folder, timeout_seconds, 0.3, silence_seconds) as watchdog:
            behave(rank, watchdog, *arguments)
    except UserError as error:
        os.write(2, f"error: {error}".encode())
        os._exit(2)
    names = [thread.name for thread in threading.enumerate() if thread.name.startswith("watchdog")]
    assert not names, names


class Ranks:
    """Ranks that run to their end: exit statuses, messages, stacks, and when each had ended except `but`."""

    def __init__(
        self,
        folder: Path,
        world: int,
        behave,
        *arguments,
        timeout_seconds=60.0,
        silence_seconds=SILENCE_SECONDS,
        but=(),
    ):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["megafusion.engine.engine", "megafusion.resilience.watchdog.thread"])
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        common = (world, port, folder, timeout_seconds, silence_seconds, behave, arguments)
        processes = [
            context.Process(target=run_rank, args=(rank, *common), daemon=True) for rank in range(world)
        ]
        for process in processes:
            process.start()
        self.ended = []
        for rank, process in enumerate(processes):
            if rank not in but:
                process.join(60)
                self.ended.append(time.time())
        for rank in but:
            if processes[rank].is_alive():  # stopped: continued when all others have exited
                os.kill(processes[rank].pid, signal.SIGCONT)
                processes[rank].join(20)
        self.statuses = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
            process.join()
        self.errors = [(folder / f"stderr-{rank}").read_text() for rank in range(world)]
        reports = [part for error in self.errors for part in re.findall(r"megafusion: .*", error, re.DOTALL)]
        self.report = reports[0] if len(reports) == 1 else f"{len(reports)} reports"
        self.stacks = sorted(path.name for path in (folder / "stacks").glob("rank-*"))


WAITS = r"step \d, train, in all_gather called from megafusion/parallel/errors\.py:\d+ raise_on_all_ranks"


# Rank 0, which publishes the reports of others, stands for rank 1.
@pytest.mark.parametrize(("culprit", "others"), [(0, "ranks 1-2"), *full((1, "ranks 0, 2"))])
@pytest.mark.parametrize(
    ("number", "state", "statuses"),
    [
        (signal.SIGSTOP, "stopped", (ExitStatus.RETRY, -signal.SIGALRM)),
        (signal.SIGKILL, "gone", (-signal.SIGKILL,)),
    ],
)
def test_a_rank_that_is_stopped_or_killed_is_named(tmp_path, culprit, others, number, state, statuses):
    # After a failed collective processes are checked, so that no silence needs to pass.
    silence_seconds = 15.0 if number == signal.SIGKILL else SILENCE_SECONDS
    behaviour = (signal_itself, culprit, number, tmp_path / "mark")
    ranks = Ranks(tmp_path, 3, *behaviour, silence_seconds=silence_seconds, but=(culprit,))
    assert [s for rank, s in enumerate(ranks.statuses) if rank != culprit] == [ExitStatus.RETRY] * 2, (
        ranks.errors
    )
    assert ranks.statuses[culprit] in statuses  # a stopped one continues at the end
    assert re.search(rf"^megafusion: rank {culprit}\b.* does not answer", ranks.report), ranks.errors
    assert re.search(rf"^  rank {culprit}: its process is {state}; last seen at step 2", ranks.report, re.M)
    assert re.search(rf"^  {others}: {WAITS}", ranks.report, re.M), ranks.report
    for rank in {0, 1, 2} - {culprit}:
        assert "join_collective" in (tmp_path / f"stacks/rank-0000{rank}.txt").read_text()
    assert ranks.ended[-1] - (tmp_path / "mark").stat().st_mtime < 4 * SILENCE_SECONDS


def test_a_rank_that_never_joins_a_collective_is_named_with_its_function(tmp_path):
    ranks = Ranks(tmp_path, 3, never_join, 1, timeout_seconds=4.0)
    assert ranks.statuses == [ExitStatus.RETRY] * 3, ranks.errors
    assert re.search(
        r"^megafusion: rank \d made no progress for 4 s \(resilience\.timeout_seconds\)", ranks.report
    )
    assert re.search(rf"^  ranks 0, 2: {WAITS}", ranks.report, re.M), ranks.report
    assert re.search(r"^  rank 1: in no collective while others wait.* read_forever$", ranks.report, re.M)
    assert "read_forever" in (tmp_path / "stacks/rank-00001.txt").read_text()


def test_a_rank_killed_while_the_others_compute_is_named(tmp_path):
    ranks = Ranks(tmp_path, 2, signal_itself, 1, signal.SIGKILL, tmp_path / "mark", compute)
    assert ranks.statuses == [ExitStatus.RETRY, -signal.SIGKILL], ranks.errors
    assert ranks.report.startswith("megafusion: rank 1 does not answer"), ranks.errors
    assert re.search(r"^  rank 0: step 2, train, at .*test_watchdog\.py:\d+ compute$", ranks.report, re.M)
    assert re.search(r"^  rank 1: its process is gone; last seen at step 2", ranks.report, re.M)
    # That is less than 60 s with the default silence of 15 s.
    assert ranks.ended[-1] - (tmp_path / "mark").stat().st_mtime < 4 * SILENCE_SECONDS


def test_the_wait_for_an_asynchronous_collective_is_located(tmp_path):
    ranks = Ranks(tmp_path, 2, wait_for_a_handle, timeout_seconds=2.0)
    assert ranks.statuses == [ExitStatus.RETRY] * 2, ranks.errors
    assert re.search(
        r"^  rank 0: step 2, train, in wait called from .*test_watchdog\.py:\d+ wait_for_a_handle$",
        ranks.report,
        re.M,
    ), ranks.report
    assert re.search(r"^  rank 1: in no collective while others wait", ranks.report, re.M), ranks.report


def test_ranks_that_were_all_stopped_for_long_end_with_a_status_that_restarts(tmp_path):
    ranks = Ranks(tmp_path, 2, stop_together, tmp_path, 4 * SILENCE_SECONDS)
    assert set(ranks.statuses) <= {0, ExitStatus.RETRY, -signal.SIGALRM}, ranks.errors


def test_a_rank_that_holds_the_gil_exits(tmp_path):
    ranks = Ranks(tmp_path, 2, hold_the_gil, 1, silence_seconds=2.0)
    assert ranks.statuses == [ExitStatus.RETRY, -signal.SIGALRM], ranks.errors
    assert "megafusion: rank 1 does not answer" in ranks.errors[0]
    assert "hold_the_gil" in ranks.errors[1]


@pytest.mark.parametrize(
    ("culprit", "error", "status"), [(0, KeyError("shape"), 1), (1, UserError("the disk is full"), 2)]
)
def test_a_rank_that_fails_alone_keeps_its_error_and_shuts_down_the_others(tmp_path, culprit, error, status):
    ranks = Ranks(tmp_path, 2, fail_alone, culprit, error)
    assert (ranks.statuses[culprit], ranks.statuses[1 - culprit]) == (status, ExitStatus.RETRY), ranks.errors
    name = type(error).__name__
    assert f"megafusion: rank {culprit} has ended with {name}: {error}" in ranks.errors[1 - culprit]
    assert f"{error}" in ranks.errors[culprit]
    assert "megafusion:" not in ranks.errors[culprit]


def test_an_error_of_all_ranks_propagates(tmp_path):
    ranks = Ranks(tmp_path, 2, raise_together)
    assert ranks.statuses == [2, 2]
    assert [error.splitlines()[-1] for error in ranks.errors] == ["error: no such shards"] * 2


def test_a_normal_end_leaves_nothing_behind(tmp_path):
    ranks = Ranks(tmp_path, 3, end_one_after_another, tmp_path / "mark", silence_seconds=30.0)
    assert ranks.statuses == [0, 0, 0], ranks.errors
    # Rank 0, which hosts the store, waits until the others know, not until they have ended or are silent.
    assert ranks.ended[0] - (tmp_path / "mark").stat().st_mtime < 30.0
    assert not (tmp_path / "stacks").exists()
    assert not any("TCPStore" in error or "megafusion" in error for error in ranks.errors), ranks.errors


def test_a_single_process_that_hangs_dumps_its_stacks_and_exits(tmp_path):
    ranks = Ranks(tmp_path, 1, never_join, 0, timeout_seconds=1.0)
    assert ranks.statuses == [ExitStatus.RETRY]
    assert re.search(r"^  rank 0: step 2, train, at .*read_forever$", ranks.report, re.M), ranks.report
    assert ranks.stacks == ["rank-00000.txt"]


def test_a_failed_dump_does_not_hold_the_message_back(tmp_path, capfd):
    start_process_group()
    (tmp_path / "file").touch()
    local = LocalState(tmp_path / "writable", interval=1.0, silence=15.0)
    _dump_stacks("lost", local)
    assert (tmp_path / "writable" / "rank-00000.txt").is_file()
    local.folder = tmp_path / "file" / "stacks"
    _dump_stacks("lost", local)
    _publish("megafusion: lost", local)
    assert capfd.readouterr().err.count("megafusion: lost") == 1


def test_format_ranks():
    words = [format_ranks(ranks) for ranks in ([3], [5, 0, 1, 2], [0, 1])]
    assert words == ["rank 3", "ranks 0-2, 5", "ranks 0-1"]
