"""A real SLURM of two nodes: a run grows, is cancelled, shrinks, crashes. `make slurm-test` does the rest."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from megafusion.errors import ExitStatus
from tests.support.cluster import Cluster, local_cluster, missing_programs
from tests.support.container import make_image, program
from tests.support.small import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(missing_programs()),
        reason=f"no SLURM (apt-get install slurm-wlm munge): {', '.join(missing_programs())} missing",
    ),
]


def launch(cluster: Cluster, config: Path, nodes: int, *more: str) -> tuple[str, str]:
    """Job ID, and the output of the command."""
    command = [sys.executable, "-m", "megafusion.cli", "launch", str(config), "--site", "local-test"]
    environment = os.environ | cluster.environment | {"OMP_NUM_THREADS": "1"}
    output = subprocess.run(
        [*command, "--nodes", str(nodes), *more],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return output.split()[1].rstrip(":"), output


def wait_for_step(run: Path, start: int, step: int) -> None:
    deadline = time.monotonic() + 120
    while True:
        attempts = json.loads((run / "starts.json").read_text()) if (run / "starts.json").exists() else []
        if len(attempts) > start and int((run / "step").read_text()) >= attempts[-1]["resumed_at"] + step:
            return
        assert time.monotonic() < deadline, (run / "logs/rank-00000.log").read_text()
        time.sleep(0.2)


def test_a_run_grows_stops_when_cancelled_and_shrinks(run_values, tmp_path):
    run_values["train"]["num_steps"] = 400
    run_values["checkpoint"] = {"every": 50}
    config, run = tmp_path / "config.yaml", Path(run_values["out"])
    config.write_text(yaml.safe_dump(run_values))
    with local_cluster() as cluster:
        small, _ = launch(cluster, config, nodes=1)
        wait_for_step(run, 0, 5)
        large, output = launch(cluster, config, nodes=2)
        assert (
            f"job {small} of this run is still queued or running; {large} starts when it has ended" in output
        )
        assert cluster.job(large)["JobState"] == "PENDING"
        cluster.ask("scancel", "--signal=USR1", small)
        assert cluster.wait_for(small, {"COMPLETED"}, 60)
        wait_for_step(run, 1, 5)
        cluster.ask("scancel", large)
        cluster.wait_for(large, {"CANCELLED"}, 60)
        time.sleep(12)  # longer than a requeued job waits
        assert cluster.job(large)["JobState"] == "CANCELLED"
        last, _ = launch(cluster, config, nodes=1)
        cluster.wait_for(last, {"COMPLETED"}, 180)
    attempts = json.loads((run / "starts.json").read_text())
    assert [attempt["world_size"] for attempt in attempts] == [1, 2, 1]
    assert [attempt["ended"] for attempt in attempts] == ["preempted", "preempted", "finished"]
    assert 0 < attempts[1]["resumed_at"] < attempts[2]["resumed_at"] < 400
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 401))


def test_a_crash_loop_and_a_refusal_end_the_job(run_values, tmp_path):
    """The first is submitted by sbatch, without `megafusion launch`."""
    config, run = tmp_path / "config.yaml", Path(run_values["out"])
    config.write_text(yaml.safe_dump(run_values))
    fake = tmp_path / "fake/torch"  # the trainer dies as it loads torch
    fake.mkdir(parents=True)
    (fake / "__init__.py").write_text("import os\nos.kill(os.getpid(), 9)\n")
    site = tmp_path / "site.env"
    values = (ROOT / "launchers/sites/local-test.env").read_text()
    site.write_text(f"{values}MEGAFUSION_PYTHON={sys.executable}\nPYTHONPATH={fake.parent}\n")
    with local_cluster() as cluster:
        script = "launchers/slurm/train.sbatch"
        log = tmp_path / "job.log"
        job = subprocess.run(
            [
                "sbatch",
                "--parsable",
                "--nodes=2",
                "--ntasks-per-node=1",
                f"--output={log}",
                script,
                str(config),
                "resilience.max_crashes=2",
            ],
            cwd=ROOT,
            env=os.environ | cluster.environment | {"MEGAFUSION_SITE": str(site)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        cluster.wait_for(job, {"FAILED"}, 120)
        assert cluster.job(job)["Restarts"] == "2", log.read_text()
        assert cluster.job(job)["ExitCode"] == f"{ExitStatus.FAILED:d}:0"
        assert "crash loop: the last 2 attempts crashed" in (run / "logs/rank-00000.log").read_text()
        run_values["data"]["tokenizer"] = str(tmp_path / "nowhere.model")
        config.write_text(yaml.safe_dump(run_values))
        refused, _ = launch(cluster, config, nodes=1)
        cluster.wait_for(refused, {"FAILED"}, 120)
        assert cluster.job(refused)["Restarts"] == "0"
        assert cluster.job(refused)["ExitCode"] == "2:0"
    assert "nowhere.model" in (run / "logs/rank-00000.log").read_text()


def ranks(config: Path) -> list[psutil.Process]:
    """The trainers of this configuration, which SLURM has started."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if words[1:] == ["-m", "megafusion.cli", "train", str(config)]:
            found.append(process)
    return found


def test_a_signal_before_the_ranks_and_an_absent_controller_lose_no_job(run_values, tmp_path):
    """In a container: everything of the job that needs megafusion runs with the image's Python."""
    run_values["train"]["num_steps"] = 600
    run_values["checkpoint"] = {"every": 100}
    config, run, log = tmp_path / "config.yaml", Path(run_values["out"]), tmp_path / "job.log"
    config.write_text(yaml.safe_dump(run_values))
    image = make_image(tmp_path)
    setup = program(tmp_path / "setup.sh", f"! mkdir {tmp_path}/told 2> /dev/null || kill -USR1 $$\n")
    site = tmp_path / "site.env"
    values = (ROOT / "launchers/sites/local-test.env").read_text()
    names = {name: image[name] for name in image if name.startswith("MEGAFUSION_")}
    names |= {"MEGAFUSION_SETUP": str(setup)}
    site.write_text(values + "".join(f"{name}={value}\n" for name, value in names.items()))
    with local_cluster() as cluster:
        job = subprocess.run(
            [
                "sbatch",
                "--parsable",
                "--nodes=2",
                "--ntasks-per-node=1",
                f"--output={log}",
                "launchers/slurm/train.sbatch",
                str(config),
            ],
            cwd=ROOT,
            env=os.environ
            | cluster.environment
            | {"MEGAFUSION_SITE": str(site), "PATH": image["PATH"], "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        wait_for_step(run, 0, 5)
        assert cluster.job(job)["Restarts"] == "1", log.read_text()
        with cluster.without_controller():
            for process in ranks(config):
                process.send_signal(signal.SIGUSR1)
            psutil.wait_procs(ranks(config), 60)
            time.sleep(30)  # the script's questions fail meanwhile
        wait_for_step(run, 1, 5)
        cluster.wait_for(job, {"COMPLETED"}, 180)
        assert cluster.job(job)["Restarts"] == "2"
    assert "asked to stop before the ranks were started: requeueing" in log.read_text()
    attempts = json.loads((run / "starts.json").read_text())
    assert [attempt["ended"] for attempt in attempts] == ["preempted", "finished"]


def test_a_killed_deepspeed_launcher_is_not_a_finished_run(run_values, tmp_path):
    """DeepSpeed's runner above it exits with 0, and its ranks remain."""
    run_values["train"]["num_steps"] = 800
    run_values["checkpoint"] = {"every": 100}
    config, run = tmp_path / "config.yaml", Path(run_values["out"])
    config.write_text(yaml.safe_dump(run_values))
    with local_cluster() as cluster:
        job, _ = launch(cluster, config, 1, "--launcher", "deepspeed")
        wait_for_step(run, 0, 15)
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or []
            if "deepspeed.launcher.launch" in words and str(run) in words:
                process.kill()
        cluster.wait_for(job, {"COMPLETED"}, 180)
        assert cluster.job(job)["Restarts"] == "1"
    assert re.search(
        r"start 1: exit status 0 at checkpoint \S+, unfinished: requeueing",
        (run / f"logs/job-{job}.log").read_text(),
    )
    attempts = json.loads((run / "starts.json").read_text())
    assert [attempt["ended"] for attempt in attempts] == ["preempted", "finished"]
