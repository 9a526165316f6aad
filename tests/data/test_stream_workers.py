"""Worker processes: their errors are raised in the run, and all of them end with it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing import forkserver
from operator import truediv
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from megafusion.errors import UserError
from megafusion.processes import STOP_SIGNALS
from tests.support.marks import full
from tests.support.rows import digest, stream_of, write_pairs

ROOT = Path(__file__).parents[2]


@pytest.fixture
def sources(tmp_path):
    return {"pairs": (write_pairs(tmp_path / "pairs", 200), 1.0)}


def workers_of(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


@pytest.fixture
def own_workers():
    """Workers started since the test began, without the fork server."""
    forkserver.ensure_running()
    before = set(workers_of(os.getpid()))
    return lambda: [process for process in workers_of(os.getpid()) if process not in before]


def have_ended(processes: list[psutil.Process], seconds: float = 20) -> bool:
    return not psutil.wait_procs(processes, timeout=seconds)[1]


def test_closing_ends_the_workers(sources, own_workers):
    with stream_of(sources, range(4), 4, num_workers=2, prefetch=3) as stream:
        stream.next()
        started = own_workers()
        assert len(started) == 2
    assert have_ended(started)


def test_no_more_workers_than_rows(sources, own_workers):
    with stream_of(sources, range(2), 2, num_workers=7) as stream:
        stream.next()
        assert len(own_workers()) == 2


def test_workers_do_not_use_the_global_generator(sources):
    before = torch.get_rng_state()
    with stream_of(sources, range(4), 4, num_workers=2) as stream:
        stream.next()
    assert torch.equal(before, torch.get_rng_state())


def test_a_workers_error_is_raised_in_the_run_with_the_files_name(sources, own_workers, tmp_path):
    """When its batch is due, as without workers."""
    late = stream_of(sources, range(4), 4)._streams[2]._sources["pairs"].document_at(2, 0, 45)
    path = tmp_path / f"pairs/shard-{late // 16:06d}.tar"
    with path.open("r+b") as file:
        file.seek(int(np.load(path.with_suffix(".index.npy"))[late % 16]))
        file.write(b"\xff")

    def steps(num_workers: int) -> tuple[int, str]:
        with stream_of(sources, range(4), 4, num_workers=num_workers) as stream:
            for step in range(100):
                try:
                    stream.next()
                except UserError as error:
                    return step, str(error)
        raise AssertionError

    step, message = steps(0)
    assert step > 0
    assert path.name in message
    assert steps(2)[0] == step
    assert path.name in steps(2)[1]
    assert not own_workers()


def test_a_killed_worker_is_named(sources, own_workers):
    with stream_of(sources, range(4), 4, num_workers=2) as stream:
        stream.next()
        own_workers()[0].kill()
        message = r"a data worker process has died .*lower data\.num_workers"
        with pytest.raises(UserError, match=message):
            [stream.next() for _ in range(2000)]
        assert have_ended(own_workers())


def test_an_unexpected_error_keeps_its_traceback(sources):
    stream = stream_of(sources, range(4), 4, num_workers=1)
    stream._builders[0] = partial(truediv, 0)
    with stream, pytest.raises(ZeroDivisionError, match="in DataLoader worker process 0"):
        stream.next()


def logged(log: Path, make: Callable, number: int):
    with log.open("a") as file:
        file.write("x")
    return make(number)


def test_prefetch_is_bounded(sources, tmp_path):
    """A worker builds no more than `prefetch` batches ahead, however long it waits."""
    log = tmp_path / "made"
    stream = stream_of(sources, range(4), 4, num_workers=1, prefetch=3)
    stream._builders[0] = partial(logged, log, stream._builders[0])
    with stream:
        stream.next()
        time.sleep(1)
        assert len(log.read_text()) <= 1 + 3


SCRIPT = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it
from tests.support.rows import stream_of
with stream_of({"pairs": (sys.argv[1], 1.0)}, range(4), 4, num_workers=2, prefetch=8) as stream:
    stream.next()
    print("ready", flush=True)
    while True:
        stream.next()
        time.sleep(0.02)
"""


@contextmanager
def reading(folder: Path) -> Iterator[tuple[subprocess.Popen, list[psutil.Process]]]:
    """A process that reads batches, and the processes that it has started."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    command = [sys.executable, "-c", SCRIPT, str(folder)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT, env=environment
    ) as process:
        assert process.stdout.readline() == b"ready\n"
        started = workers_of(process.pid)
        assert len(started) >= 2  # the fork server included
        try:
            yield process, started
        finally:
            process.kill()


# SIGKILL, after which nothing can be cleaned up, represents the other signals.
@pytest.mark.parametrize("how", [signal.SIGKILL, *full(signal.SIGTERM, signal.SIGINT)])
def test_workers_end_with_their_parent_however_it_ends(sources, how):
    with reading(sources["pairs"][0]) as (process, started):
        process.send_signal(how)
        assert process.wait(20) != 0
    assert have_ended(started, 10)


def test_workers_ignore_stop_signals(sources):
    with reading(sources["pairs"][0]) as (process, started):
        for other in started:
            for number in STOP_SIGNALS:
                other.send_signal(number)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1.5)
        assert all(other.is_running() and other.status() != psutil.STATUS_ZOMBIE for other in started)
    assert have_ended(started, 10)


def test_later_batches_do_not_overwrite_earlier_ones(sources):
    with stream_of(sources, range(4), 4, num_workers=1) as stream:
        batch = stream.next()
        before = digest(batch)
        for _ in range(10):
            stream.next()
        assert digest(batch) == before
