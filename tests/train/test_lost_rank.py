"""A rank that is killed while it saves: the others end and name it, and the run goes on from before."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch.distributed as dist
import yaml

from megafusion.checkpoint import manager as checkpointer
from megafusion.checkpoint.folder import complete_checkpoints, verify_checkpoint
from megafusion.config import parse_config
from megafusion.telemetry.metrics_file import read_metrics
from megafusion.train.config import RunConfig
from megafusion.train.loop import train
from tests.support.marks import full
from tests.support.workers import WorkersFailed, run_workers


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


# make test-faults kills ranks, too.
@pytest.mark.parametrize(
    ("parallel", "lost"),
    full(({"pipeline": 2}, 0), ({"tensor": 2, "pipeline": 2}, 0), ({"tensor": 2, "pipeline": 2}, 3)),
)
def test_a_rank_killed_while_saving_is_named_and_the_run_goes_on(run_values, tmp_path, parallel, lost):
    run_values["parallel"] = parallel
    world = 2 ** len(parallel)
    run_values["train"]["num_steps"] = 6
    run_values["checkpoint"] = {"every": 2}
    whole = run_values | {"out": str(tmp_path / "whole")}
    run_workers(train_until_killed, world, whole, None)
    with pytest.raises(WorkersFailed) as failed:
        run_workers(train_until_killed, world, run_values, lost, seconds_after_failure=60)
    run = Path(run_values["out"])
    said = str(failed.value)
    assert f"rank {lost}: ended with status -9" in said
    assert all(f"rank {rank}: ended with status 75" in said for rank in range(world) if rank != lost), said
    (report,) = (run / "stacks").glob("report-*.txt")
    first, *places = report.read_text().splitlines()
    assert f"rank {lost} does not answer" in first
    waiting = [place for place in places if re.search(r" in \w+ called from megafusion/\w+/\w+\.py:", place)]
    assert waiting, places  # in which collective depends on what the killed rank had sent by then
    checkpoints = complete_checkpoints(run / "checkpoints")
    assert [path.name for path in checkpoints] == ["step-00000002"]
    verify_checkpoint(checkpoints[0])
    run_workers(train_until_killed, world, run_values, None)
    assert losses(run) == losses(tmp_path / "whole")


def keep_store_until_it_is_used(pipe: Connection) -> None:
    """The store of two ranks, of which the first never comes, and which ends when the second waits for it."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipe.send(store.port)
    while store.num_keys() < 2:
        time.sleep(0.05)
    time.sleep(1)
    os._exit(0)


def test_a_rank_lost_before_all_have_met_is_a_reason_to_start_again(run_values, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(run_values))
    receive, send = multiprocessing.Pipe(duplex=False)
    keeper = multiprocessing.get_context("forkserver").Process(
        target=keep_store_until_it_is_used, args=(send,), daemon=True
    )
    keeper.start()
    environment = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(receive.recv())}
    done = subprocess.run(
        [sys.executable, "-m", "megafusion.cli", "train", str(config)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    keeper.join()
    assert done.returncode == 75, done.stderr
    assert "a process was lost before all ranks had connected" in done.stderr
