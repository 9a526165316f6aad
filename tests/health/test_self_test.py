"""The start-up self-test passes on a sound machine in well under a second, and names the rank that is not."""

import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megafusion.errors import UserError
from megafusion.health.self_test import self_test
from megafusion.health.signals import StopSignals
from tests.workers import run_workers


def sound(folder: Path) -> tuple[int, bool, float]:
    began = time.perf_counter()
    hosts, stops = self_test(folder, torch.device("cpu"), wants_stop=dist.get_rank() == 1)
    return len(hosts), stops, time.perf_counter() - began


def test_a_sound_machine_passes_and_one_wish_to_stop_reaches_all(tmp_path):
    answers = run_workers(sound, 2, tmp_path)
    assert [answer[:2] for answer in answers] == [(2, True)] * 2
    assert max(answer[2] for answer in answers) < 1
    assert list(tmp_path.iterdir()) == []


def wrong_on(what: str, victim: int, folder: Path) -> str:
    """The refusal that this rank gets."""
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
        else:
            folder = folder / "none"
    with pytest.raises(UserError) as refused:
        self_test(folder, torch.device("cpu"), wants_stop=False)
    assert refused.value.exit_status == 1
    return str(refused.value)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("product", "a matrix product on cpu is wrong"),
        ("sum", "an all-reduce gave a wrong sum"),
        ("disk", "cannot be written (No such file or directory)"),
    ],
)
def test_the_rank_that_fails_is_named_on_all(tmp_path, what, said):
    first, second = run_workers(wrong_on, 2, what, 1, tmp_path)
    assert first == second
    assert "rank 1 on " in first
    assert said in first
    assert "rank 0" not in first


def test_signals_are_noted_and_further_ones_change_nothing():
    (requested,) = run_workers(signalled, 1)
    assert requested == [False, True, True]


def signalled() -> list[bool]:
    import os
    import signal

    signals = StopSignals().listen()
    seen = [signals.requested]
    for number in (signal.SIGUSR1, signal.SIGTERM):
        os.kill(os.getpid(), number)
        time.sleep(0.01)
        seen.append(signals.requested)
    return seen
