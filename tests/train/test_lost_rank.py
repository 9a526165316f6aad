"""A rank that is killed while it saves: the others end and name it, and the run goes on from before."""

import os
import re
import signal
from pathlib import Path

import pytest
import torch.distributed as dist

from megafusion.checkpoint import checkpointer
from megafusion.checkpoint.folder import complete_checkpoints, verify_checkpoint
from megafusion.config import parse_config
from megafusion.train.config import RunConfig
from megafusion.train.metrics import read_metrics
from megafusion.train.run import train
from tests.workers import WorkersFailed, run_workers


def train_until_killed(values: dict, lost: int | None) -> None:
    """Train; the lost rank is killed as it writes its second checkpoint."""
    write, written = checkpointer._Writer.write_data, []

    def write_or_die(self, plan, planner):
        written.append(plan)
        if dist.get_rank() == lost and len(written) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return write(self, plan, planner)

    checkpointer._Writer.write_data = write_or_die
    train(parse_config(RunConfig, values, "test"))


def losses(run: Path) -> list[tuple]:
    return [(line["step"], line["text_loss"], line["image_loss"]) for line in read_metrics(run)]


@pytest.mark.parametrize("lost", [0, 3])
def test_a_rank_killed_while_saving_is_named_and_the_run_goes_on(run_values, tmp_path, lost):
    run_values["parallel"] = {"tensor": 2, "pipeline": 2}
    run_values["train"] |= {"num_steps": 6, "checkpoint_every": 2}
    whole = run_values | {"out": str(tmp_path / "whole")}
    run_workers(train_until_killed, 4, whole, None)
    with pytest.raises(WorkersFailed) as failed:
        run_workers(train_until_killed, 4, run_values, lost, seconds_after_failure=60)
    run = Path(run_values["out"])
    said = str(failed.value)
    assert f"rank {lost}: ended with status -9" in said
    assert all(f"rank {rank}: ended with status 75" in said for rank in range(4) if rank != lost), said
    (report,) = (run / "stacks").glob("report-*.txt")
    first, *places = report.read_text().splitlines()
    assert f"rank {lost} does not answer" in first
    # In a backward pass no frame of the layer is left between autograd and the collective.
    waits = r"in _all_reduce called from megafusion/(parallel/tensor|train/step)\.py"
    assert any(re.search(waits, place) for place in places), places
    checkpoints = complete_checkpoints(run / "checkpoints")
    assert [path.name for path in checkpoints] == ["step-00000002"]
    verify_checkpoint(checkpoints[0])
    run_workers(train_until_killed, 4, run_values, None)
    assert losses(run) == losses(tmp_path / "whole")
