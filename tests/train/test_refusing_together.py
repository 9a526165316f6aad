"""An error of one rank ends all ranks, with its message and the exit status of a refusal."""

import errno
from pathlib import Path

import pytest
import torch.distributed as dist

from megafusion.config import parse_config
from megafusion.data.loader import DataLoader
from megafusion.errors import UserError
from megafusion.resilience.attempts import read_attempts
from megafusion.telemetry import trackers
from megafusion.train.config import RunConfig
from megafusion.train.loop import train
from tests.support.workers import run_workers


def bad_shard(rank: int, at_batch: int) -> None:
    """A rank's stream refuses a batch."""
    following, number = DataLoader.next, [0]

    def next_one(self: DataLoader) -> object:
        number[0] += 1
        if number[0] > at_batch and dist.get_rank() == rank:
            raise UserError("shard-000003.tar: damaged")
        return following(self)

    DataLoader.next = next_one


def full_disk(rank: int, at_batch: int) -> None:
    """Rank 0's lines of metrics have no room from some line on."""
    number = [0]

    def dumps(values: dict) -> str:
        number[0] += 1
        if number[0] > at_batch:
            raise OSError(errno.ENOSPC, "No space left on device")
        return "{}"

    trackers.json = type("json", (), {"dumps": staticmethod(dumps)})


def refused(values: dict, hurt, *arguments: int) -> str:
    hurt(*arguments)
    with pytest.raises(UserError) as found:
        train(parse_config(RunConfig, values, "test"))
    assert found.value.on_every_rank
    return str(found.value)


@pytest.mark.parametrize(
    ("hurt", "rank", "at_batch", "message"),
    [
        (bad_shard, 1, 0, "shard-000003.tar: damaged"),
        (bad_shard, 1, 3, "shard-000003.tar: damaged"),
        (full_disk, 0, 2, "cannot write metrics (No space left on device)"),
        (full_disk, 0, 5, "cannot write metrics (No space left on device)"),  # the last line of all
    ],
    ids=["the first batch", "a later batch", "metrics", "the last metrics"],
)
def test_all_ranks_refuse_what_one_does(run_values, hurt, rank, at_batch, message):
    run_values["parallel"] = {"tensor": 1}
    answers = run_workers(refused, 2, run_values, hurt, rank, at_batch)
    assert all(message in answer for answer in answers), answers
    assert read_attempts(Path(run_values["out"]))[-1]["ended"] == "refused"
