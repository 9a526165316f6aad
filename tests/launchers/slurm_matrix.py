"""`make slurm-test`: a real SLURM of two nodes, and runs on it that are disturbed repeatedly.

Prints the results and writes runs/slurm.json. The reference is the same run, undisturbed.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from megafusion.checkpoint.folder import complete_checkpoints, verify_checkpoint
from megafusion.telemetry.metrics_file import read_metrics
from tests.faults.job import newest, same_bits
from tests.support.cluster import Cluster, local_cluster, missing_programs
from tests.support.small import ROOT, make_shards, make_vae, small_run

NUM_STEPS = 600
DISTURBANCES = {
    "signal": "scancel --signal=USR1",
    "signal-script": "scancel --batch --signal=USR1",
    "warned": "a time limit, announced by SIGUSR1",
    "limit": "an unannounced time limit",
    "down-first": "the node with rank 0 and the job's script set down",
    "down-last": "the other node set down",
    "requeue": "scontrol requeue",
}
TEN = ("signal", "warned", "down-last", "requeue", "signal-script", "down-first", "signal", "warned")
RUNS = {"srun": (*TEN, "down-last", "requeue"), "deepspeed": ("signal", "limit", "down-first", "requeue")}


def main() -> None:
    if missing := missing_programs():
        sys.exit(
            f"slurm-test: SLURM is not installed ({', '.join(missing)} missing), so nothing was tested; "
            "on Debian: apt-get install slurm-wlm munge"
        )
    with tempfile.TemporaryDirectory(prefix="megafusion-runs-") as name, local_cluster() as cluster:
        folder = Path(name)
        config = _config(folder)
        started = time.time()
        runs = folder / "runs"
        undisturbed = _launch(cluster, config, runs / "undisturbed", "srun", {})
        cluster.wait_for(undisturbed, {"COMPLETED"}, 1500)
        print(f"undisturbed: {NUM_STEPS} steps in {time.time() - started:.0f} s", flush=True)
        cases = []
        for run in RUNS.items():
            cases.append(_disturbed(cluster, config, runs, *run))
            verdict = {name: cases[-1][name] for name in ("restarts", "same_parameters", "problems")}
            print(f"{run[0]}: {verdict}", flush=True)
        version = cluster.ask("sinfo", "--version").strip()
    report = {"slurm": version, "nodes": 2, "num_steps": NUM_STEPS, "runs": cases}
    (ROOT / "runs").mkdir(exist_ok=True)
    (ROOT / "runs/slurm.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))
    bad = [case["launcher"] for case in cases if not case["same_parameters"] or case["problems"]]
    sys.exit(f"slurm-test: {', '.join(bad)}: not as the undisturbed run" if bad else 0)


def _config(folder: Path) -> Path:
    shards = folder / "shards"
    shards.mkdir()
    vae = make_vae(folder / "vae")
    values = small_run(make_shards(shards, vae), vae, folder / "run")
    values["data"] |= {"sequence_length": 128, "num_streams": 16}
    values["model"] |= {"num_layers": 6, "hidden_size": 96, "ffn_hidden_size": 256}
    values["train"] |= {"num_steps": NUM_STEPS, "global_batch_size": 16, "micro_batch_size": 1}
    values["checkpoint"] = {"every": 25}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def _launch(cluster: Cluster, config: Path, out: Path, launcher: str, environment: dict[str, str]) -> str:
    """Submit a run by `megafusion launch`; returns the job ID."""
    command = [sys.executable, "-m", "megafusion.cli", "launch", str(config), f"out={out}"]
    command += ["--site", "local-test", "--nodes", "2", "--launcher", launcher]
    environment = os.environ | cluster.environment | environment
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[1].rstrip(":")


def _disturbed(cluster: Cluster, config: Path, runs: Path, launcher: str, disturbances: tuple) -> dict:
    out = runs / launcher
    # For an unannounced limit the warning is a signal without effect, SIGCONT.
    unannounced = {"SBATCH_SIGNAL": "CONT@1"} if "limit" in disturbances else {}
    job = _launch(cluster, config, out, launcher, unannounced)
    happened = []
    try:
        for number, what in enumerate(disturbances):
            happened.append(_disturb(cluster, job, out, what, number))
            print(f"{launcher}: {happened[-1]}", flush=True)
        cluster.wait_for(job, {"COMPLETED"}, 1500)
    except AssertionError as error:
        logs = "\n".join(path.read_text()[-3000:] for path in sorted((out / "logs").glob("*")))
        raise AssertionError(f"{error}\n{logs}\n{cluster.logs()}") from error
    restarts = int(cluster.job(job)["Restarts"])
    problems = [] if restarts == len(disturbances) else [f"{restarts} restarts"]
    for checkpoint in complete_checkpoints(out / "checkpoints"):
        verify_checkpoint(checkpoint)
    if _losses(out) != _losses(runs / "undisturbed"):
        problems.append("other losses than the undisturbed run")
    folders = sorted(path.name for path in runs.iterdir())
    if folders != sorted({"undisturbed", *list(RUNS)[: list(RUNS).index(launcher) + 1]}):
        problems.append(f"other folders: {folders}")
    same = same_bits(newest(out), newest(runs / "undisturbed"))
    return {
        "launcher": launcher,
        "disturbances": happened,
        "restarts": restarts,
        "same_parameters": same,
        "problems": problems,
    }


def _disturb(cluster: Cluster, job: str, out: Path, what: str, number: int) -> dict:
    """Disturb the start of this index once it trains, and wait for the next start."""
    _wait_until(lambda: _trains(cluster, job, out, number), f"start {number + 1} to train", 120)
    before, began = _last_step(out), time.time()
    node = {"down-first": "n1", "down-last": "n2"}.get(what)
    if what == "signal":
        cluster.ask("scancel", "--signal=USR1", job)
    elif what == "signal-script":
        cluster.ask("scancel", "--batch", "--signal=USR1", job)
    elif what in ("warned", "limit"):
        cluster.ask("scontrol", "update", f"JobId={job}", "TimeLimit=1")
    elif what == "requeue":
        cluster.ask("scontrol", "requeue", job)
    else:
        cluster.ask("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")
    _wait_until(lambda: int(cluster.job(job)["Restarts"]) > number, f"a restart after {what}", 180)
    if node:  # as after a repair: a job of two nodes has no other node here
        cluster.ask("scontrol", "update", f"NodeName={node}", "State=RESUME")
    cluster.wait_for(job, {"RUNNING"}, 120)
    if what in ("warned", "limit"):
        cluster.ask("scontrol", "update", f"JobId={job}", "TimeLimit=30")
    seconds = round(time.time() - began, 1)
    return {"what": DISTURBANCES[what], "at_step": before, "seconds_until_started_again": seconds}


def _trains(cluster: Cluster, job: str, out: Path, number: int) -> bool:
    """Whether the start of this index has done five steps."""
    attempts = (out / "starts.json").exists() and json.loads((out / "starts.json").read_text())
    if not attempts or len(attempts) <= number:
        return False
    assert cluster.job(job)["JobState"] == "RUNNING", cluster.job(job)
    return _last_step(out) >= attempts[-1]["resumed_at"] + 5


def _last_step(out: Path) -> int:
    lines = (out / "metrics.jsonl").read_text().splitlines() if (out / "metrics.jsonl").exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def _wait_until(condition, what: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:g} s for {what}"
        time.sleep(0.5)


def _losses(run: Path) -> list[tuple]:
    return [(line["step"], line["text_loss"], line["image_loss"]) for line in read_metrics(run)]


if __name__ == "__main__":
    main()
