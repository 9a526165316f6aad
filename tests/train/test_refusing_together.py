"""An error of one rank ends all ranks, with its message and the exit status of a refusal."""

import errno
import re
import shutil
from pathlib import Path

import pytest
import torch.distributed as dist

from megafusion.commands.train import raise_with_the_other_ranks
from megafusion.config import parse_config
from megafusion.data.reader import ShardFolder
from megafusion.data.source import Source
from megafusion.errors import UserError
from megafusion.resilience.attempts import read_attempts
from megafusion.telemetry import trackers
from megafusion.train.config import RunConfig
from megafusion.train.loop import train
from tests.support.damage import damage
from tests.support.workers import run_workers

LAST = -1


def full_disk(rank: int, at_batch: int) -> None:
    """Rank 0's lines of metrics have no room from some line on."""
    number = [0]

    def dumps(values: dict) -> str:
        number[0] += 1
        if number[0] > at_batch:
            raise OSError(errno.ENOSPC, "No space left on device")
        return "{}"

    trackers.json = type("json", (), {"dumps": staticmethod(dumps)})


def refused(values: dict, hurt=None, *arguments: int) -> str:
    if hurt:
        hurt(*arguments)
    with pytest.raises(UserError) as found:
        train(parse_config(RunConfig, values, "test"))
    assert found.value.on_every_rank
    return str(found.value)


@pytest.mark.parametrize("at_batch", [2, 5], ids=["metrics", "the last metrics"])
def test_all_ranks_refuse_a_full_disk(run_values, at_batch):
    run_values["parallel"] = {"tensor": 1}
    answers = run_workers(refused, 2, run_values, full_disk, 0, at_batch)
    assert all("cannot write metrics (No space left on device)" in answer for answer in answers), answers
    assert read_attempts(Path(run_values["out"]))[-1]["ended"] == "refused"


@pytest.mark.parametrize(
    ("bad", "ranks", "workers", "min_step"),
    [
        (range(20, 40), 2, 0, 0),  # of rank 1's streams: its first batch
        ([LAST], 2, 0, 1),
        ([LAST], 1, 1, 1),
    ],
    ids=["the first batch", "a later batch", "a worker's batch"],
)
def test_all_ranks_refuse_a_corrupt_document_of_one(
    run_values, shards, tmp_path, bad, ranks, workers, min_step
):
    folder = shutil.copytree(shards / "text", tmp_path / "text")
    if bad == [LAST]:  # the last of the first epoch of stream 2, which rank 1 reads where there are two
        bad = [Source("text", 1, ShardFolder(folder), 4, seed=0).document_at(2, 0, 9)]
    damage(folder, bad, per_shard=8)
    run_values["data"]["sources"]["text"]["path"] = str(folder)
    run_values["data"]["num_workers"] = workers
    answers = run_workers(refused, ranks, run_values) if ranks > 1 else [refused(run_values)]
    assert all(re.search(r"text/shard-00000\d\.tar, document \d: not readable \(", text) for text in answers)
    assert len(set(answers)) == 1
    (attempt,) = read_attempts(Path(run_values["out"]))
    assert attempt["ended"] == "refused"
    assert attempt["step"] >= min_step


def one_refuses(values: dict, rank: int) -> str:
    """A rank whose configuration is refused, as one is whose file differs, beside others that train."""
    error = UserError("the one rank's own: unknown key")
    refuses = dist.get_rank() == rank
    with pytest.raises(UserError) as found:
        raise_with_the_other_ranks(error) if refuses else train(parse_config(RunConfig, values, "test"))
    assert found.value.on_every_rank
    return str(found.value)


@pytest.mark.full
@pytest.mark.parametrize("degrees", [{"tensor": 2}], ids=["2 x 2"])
def test_a_configuration_that_one_rank_refuses_is_refused_by_all(run_values, degrees):
    run_values["parallel"] = degrees
    answers = run_workers(one_refuses, 4, run_values, 3, timeout=60)
    assert answers == ["the one rank's own: unknown key"] * 4
    assert not Path(run_values["out"]).exists()
