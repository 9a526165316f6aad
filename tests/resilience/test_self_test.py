"""Start-up self-test and stop signals."""

import os
import signal
import subprocess
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megafusion.errors import ExitStatus, UserError
from megafusion.processes import STOP_SIGNALS
from megafusion.resilience.self_test import self_test
from megafusion.resilience.signals import StopSignals
from tests.support.workers import WorkersFailed, run_workers


def passes(folder: Path) -> tuple[int, bool, float]:
    began = time.perf_counter()
    hosts, stops = self_test(folder, torch.device("cpu"), wants_stop=dist.get_rank() == 1)
    return len(hosts), stops, time.perf_counter() - began


def test_a_good_machine_passes_and_all_ranks_learn_of_a_stop_request(tmp_path):
    answers = run_workers(passes, 2, tmp_path)
    assert [answer[:2] for answer in answers] == [(2, True)] * 2
    assert max(answer[2] for answer in answers) < 1
    assert list(tmp_path.iterdir()) == []


def fails_on(what: str, victim: int, folder: Path) -> str:
    """The message that this rank raises."""
    if dist.get_rank() == victim:
        if what == "product":
            product = torch.Tensor.__matmul__

            def off_by_one(a, b):
                result = product(a, b)
                if result.is_floating_point():
                    result[17, 17] += 1
                return result

            torch.Tensor.__matmul__ = off_by_one
        elif what == "sum":
            reduce = dist.all_reduce

            def broken(tensor, *arguments, **named):
                reduce(tensor, *arguments, **named)
                tensor[-1] -= 1

            dist.all_reduce = broken
        elif what == "disk":
            folder = folder / "none"
        else:
            folder = folder / "read-only"
    with pytest.raises(UserError) as refused:
        self_test(folder, torch.device("cpu"), wants_stop=False)
    assert refused.value.exit_status == ExitStatus.FAILED
    return str(refused.value)


@pytest.mark.parametrize(
    ("what", "output"),
    [
        ("product", "a matrix product on cpu is wrong"),
        ("sum", "an all-reduce returned a wrong sum"),
        ("disk", "cannot be written (No such file or directory)"),
    ],
)
def test_every_rank_names_the_one_that_fails(tmp_path, what, output):
    first, second = run_workers(fails_on, 2, what, 1, tmp_path)
    assert first == second
    assert "rank 1 on " in first
    assert output in first
    assert "rank 0" not in first


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a read-only disk")
def test_a_read_only_disk_is_named(tmp_path):
    disk = tmp_path / "read-only"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(disk)], check=True)
    try:
        first, second = run_workers(fails_on, 2, "read-only", 1, tmp_path)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert first == second
    assert "rank 1 on " in first
    assert "read-only cannot be written (Read-only file system)" in first


@pytest.mark.parametrize("number", sorted(set(STOP_SIGNALS) - {signal.SIGINT}))
def test_signals_are_recorded_and_further_ones_have_no_effect(number):
    (requested,) = run_workers(signalled, 1, number)
    assert requested == [False, True, True]


def signalled_while_ignored() -> list[bool]:
    numbers = (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)
    signals = StopSignals().listen()
    signals.begin()
    requested = []
    for number in numbers:
        signal.raise_signal(number)
        requested.append(signals.requested)
    return requested


def test_signals_that_a_launcher_ignores_are_handled_except_those_of_background_jobs_and_nohup():
    assert run_workers(signalled_while_ignored, 1) == [[False, False, True]]


def interrupted_twice() -> list[bool]:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a terminal
    signals = StopSignals().listen()
    signals.begin()
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    return [signals.requested]


def test_a_second_sigint_interrupts():
    assert run_workers(interrupted_twice, 1) == [[True]]


def signalled_early() -> None:
    signals = StopSignals().listen()
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    # The main thread waits in C, where no Python handler runs.
    dist.TCPStore("127.0.0.1", 0, world_size=2, is_master=True, timeout=timedelta(seconds=30))
    assert signals


def test_a_signal_ends_a_process_that_waits_for_other_ranks():
    with pytest.raises(WorkersFailed, match="rank 0: ended with status 75"):
        run_workers(signalled_early, 1, timeout=20)


def signalled(first: int) -> list[bool]:
    signal.signal(first, signal.SIG_DFL)  # a job in the background begins with some ignored
    signals = StopSignals().listen()
    signals.begin()
    seen = [signals.requested]
    for number in (first, signal.SIGTERM):
        os.kill(os.getpid(), number)
        time.sleep(0.01)
        seen.append(signals.requested)
    return seen
