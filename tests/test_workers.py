"""The helper of tests with several ranks: results by rank, failures with their cause."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from tests.support.workers import WorkersFailed, run_workers


def sum_over_ranks(value: torch.Tensor) -> tuple[int, torch.Tensor]:
    total = value * (dist.get_rank() + 1)
    dist.all_reduce(total)
    return dist.get_rank(), total


def fail(how: str) -> None:
    if dist.get_rank() == 1:
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "hang":
            time.sleep(60)
        raise ValueError("of rank 1")


def test_results_come_by_rank():
    for rank, (found, total) in enumerate(run_workers(sum_over_ranks, 3, torch.ones(2))):
        assert found == rank
        assert total.tolist() == [6, 6]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raise", "rank 1: Traceback.*ValueError: of rank 1"),
        ("kill", "rank 1: ended with status -9"),
        ("hang", "rank 1: still running after 3 s"),
    ],
)
def test_a_rank_that_fails_is_named(how, message):
    with pytest.raises(WorkersFailed, match=f"(?s){message}") as failed:
        run_workers(fail, 2, how, timeout=3 if how == "hang" else 60)
    assert "rank 0" not in str(failed.value)
