"""`megafusion sweep`: real runs; one fails, one is interrupted, one is finished before."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from megafusion.errors import UserError
from megafusion.resilience.attempts import read_attempts
from megafusion.sweep import results
from megafusion.sweep.config import load_sweep
from megafusion.sweep.local import environment, run_members
from megafusion.sweep.members import expand
from megafusion.sweep.results import write_results
from megafusion.telemetry.metrics_file import read_metrics
from tests.support.container import program
from tests.support.runs import start
from tests.support.small import ROOT
from tests.sweep.conftest import evaluate, train


def sweep(path: Path, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "megafusion.cli", "sweep", str(path), *arguments],
        cwd=ROOT,
        env=os.environ | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.full
def test_a_failed_run_does_not_stop_the_others_and_the_exit_status_says_so(sweep_file, texts, vq_folder):
    """The first arm reads latents with a VQModel, which training refuses; the second is evaluated."""
    values = yaml.safe_load(sweep_file.read_text())
    values["runs"] = {"codes": [f"data.vae={vq_folder}"], "latents": ["train.num_steps=2"]}
    values["evaluate"] = {"suites": ["perplexity"], "options": {"texts": [str(texts)], "max_items": 2}}
    sweep_file.write_text(yaml.safe_dump(values, sort_keys=False))
    process = sweep(sweep_file)
    output = process.communicate(timeout=200)[0]
    assert process.returncode == 1, output
    found = json.loads((sweep_file.parent / "sweep/sweep.json").read_text())
    assert [run["state"] for run in found["runs"].values()] == ["failed", "finished"]
    failed, finished = found["runs"].values()
    assert failed["error"].startswith("train: exit status 2: ")
    assert "codebook" in failed["error"]
    assert finished["metrics"]["perplexity/all/perplexity"] > 1
    assert finished["step"] == 2
    assert "latents,seed=0: done" in output
    assert "| codes,seed=0 | failed: train: exit status 2" in output

    modified = (sweep_file.parent / "sweep/latents,seed=0/starts.json").stat().st_mtime_ns
    values["runs"].pop("codes")
    sweep_file.write_text(yaml.safe_dump(values, sort_keys=False))
    process = sweep(sweep_file)
    output = process.communicate(timeout=100)[0]
    assert "| latents,seed=0 | finished | 2 of 2 |" in output
    assert "codes" not in output, "it left no run"
    assert process.returncode == 0
    assert (sweep_file.parent / "sweep/latents,seed=0/starts.json").stat().st_mtime_ns == modified


@pytest.mark.full
def test_a_sweep_that_is_stopped_resumes_to_the_results_of_one_that_was_not(sweep_file):
    """Two runs at a time; SIGTERM makes both save."""
    long = ["overrides=[telemetry.log_every=1,train.num_steps=40,checkpoint.every=5]"]
    process = sweep(sweep_file, "--jobs", "2", *long)
    runs = [sweep_file.parent / f"sweep/{name},seed=0" for name in ("plain", "causal")]
    try:
        deadline = time.monotonic() + 200
        # The first checkpoint of a run may be deleted before the other run has one.
        while not all(any(run.glob("checkpoints/step-*/manifest.json")) for run in runs):
            assert time.monotonic() < deadline
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        output = process.communicate(timeout=100)[0]
    finally:
        process.kill()
    assert process.returncode == 75, output
    ends = [read_attempts(run)[-1]["ended"] for run in runs]
    assert "preempted" in ends
    assert set(ends) <= {"preempted", "finished"}
    process = sweep(sweep_file, "--jobs", "2", *long)
    output = process.communicate(timeout=200)[0]
    assert process.returncode == 0, output
    base = yaml.safe_load((sweep_file.parent / "config.yaml").read_text())
    alone = yaml.safe_load(
        (sweep_file.parent / "sweep/sweep.launch/local/plain,seed=0/config.yaml").read_text()
    )
    assert alone["data"]["sources"].keys() == base["data"]["sources"].keys()
    other = start(alone | {"out": str(sweep_file.parent / "alone")})
    assert [line["text_loss"] for line in read_metrics(runs[0])] == [
        line["text_loss"] for line in read_metrics(other)
    ]


STAND_IN = """
out=$(sed -n 's/^out: //p' "$4")
echo "start $MEGAFUSION_START"
case $out in
    *plain*) [ -f "$out/again" ] || { touch "$out/again"; kill -9 $$; } ;;
    *causal*)
        [ -f "$out/again" ] && { echo "Traceback"; exit 1; }
        touch "$out/again"; echo "error: no such data"; echo "more"; exit 2 ;;
    *unfinished*) exit 0 ;;
esac
mkdir "$out/pipeline"
echo '[{"ended": "finished", "step": 6}]' > "$out/starts.json"
"""
"""A trainer that is killed at its first start, one that refuses its data, and one that ends too early."""


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_lost_run_is_started_again_and_a_failed_one_is_not(sweep_file, monkeypatch, tmp_path, jobs):
    program(tmp_path / "python", STAND_IN)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    members = expand(load_sweep(sweep_file, ["runs.unfinished=[]"]), "sweep.yaml")
    errors = run_members(members, tmp_path / "frozen", jobs)
    assert errors.keys() == {"causal,seed=0", "unfinished,seed=0"}
    assert errors["causal,seed=0"] == "train: exit status 2: no such data"
    assert errors["unfinished,seed=0"].startswith("train: ended without being finished; see ")
    log = (members[0].out / "logs/train.log").read_text()
    assert [line[-2:] for line in log.splitlines() if line.startswith("start ")] == [":1", ":2"]
    assert run_members(members[:1], tmp_path / "frozen", jobs) == {}
    assert (members[0].out / "logs/train.log").read_text() == log, "a finished run is skipped"
    errors = run_members(members[1:2], tmp_path / "frozen", jobs)
    assert errors == {"causal,seed=0": "train: exit status 1: Traceback"}, (
        "not the reason of the start before"
    )


def test_results_are_there_whenever_a_run_has_ended(sweep_file, monkeypatch, tmp_path):
    """Each call sees what is done by then, and what failed; a sweep that is killed has shown it."""
    program(tmp_path / "python", STAND_IN)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    members = expand(load_sweep(sweep_file, ["runs.unfinished=[]"]), "sweep.yaml")
    out, seen = members[0].out.parent, []

    def record(errors: dict[str, str]) -> None:
        write_results(out, members, errors)
        runs = json.loads((out / "sweep.json").read_text())["runs"]
        seen.append([run["state"] for run in runs.values()])

    run_members(members, tmp_path / "frozen", 1, record)
    assert seen == [
        ["finished", "not started", "not started"],
        ["finished", "failed", "not started"],
        ["finished", "failed", "failed"],
    ]


@pytest.mark.full
def test_a_sweep_that_is_killed_has_written_the_runs_that_had_ended(sweep_file):
    """The second run is held in its training by a step that does not come; it is an orphan then."""
    process = sweep(sweep_file, "runs.causal=[train.num_steps=100000]")
    second = sweep_file.parent / "sweep/causal,seed=0"
    try:
        deadline = time.monotonic() + 200
        while not read_attempts(second):
            assert time.monotonic() < deadline
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.05)
        process.kill()
        process.communicate(timeout=100)
    finally:
        process.kill()
        for attempt in read_attempts(second):
            os.kill(attempt["pid"], signal.SIGKILL)
    found = json.loads((sweep_file.parent / "sweep/sweep.json").read_text())
    assert [run["state"] for run in found["runs"].values()] == ["finished", "not started"]
    assert "plain" in found["groups"]


def test_a_fault_while_recording_stops_no_run_and_is_told(sweep_file, monkeypatch, tmp_path, capfd):
    """A damaged report of a run of an earlier call; the results then cannot be gathered."""
    program(tmp_path / "python", STAND_IN)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    values = "evaluate={suites: [perplexity], options: {texts: [a.txt]}}"
    damaged = expand(load_sweep(sweep_file, [values, "runs.old=[]"]), "sweep.yaml")[-1]
    train(damaged)
    evaluate(damaged, 2.0)
    damaged.report.write_text('{"suites": [1]}')
    members = expand(load_sweep(sweep_file, ["runs.other=[]"]), "sweep.yaml")[::2]
    out = members[0].out.parent
    with pytest.raises(UserError, match=r"report\.json: is not a report of `megafusion evaluate`; delete it"):
        write_results(out, members, {}, [damaged])
    errors = run_members(
        members, tmp_path / "frozen", 1, lambda failed: write_results(out, members, failed, [damaged])
    )
    assert errors == {}
    assert all(member.is_trained for member in members)
    said = "".join(capfd.readouterr())
    assert said.count("warning: the results are not written: ") == 2
    assert not (out / "sweep.json").exists()


def test_a_run_that_cannot_be_started_does_not_stop_the_others(sweep_file, monkeypatch, tmp_path):
    """Files stand where one run's configuration and another's log would be."""
    program(tmp_path / "python", STAND_IN)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    members = expand(load_sweep(sweep_file, ["runs={logs: [], plainer: []}"]), "sweep.yaml")
    (tmp_path / "frozen").mkdir()
    (tmp_path / "frozen/causal,seed=0").write_text("")
    members[2].out.mkdir(parents=True)
    (members[2].out / "logs").write_text("")
    errors = run_members(members, tmp_path / "frozen", 1)
    assert errors["causal,seed=0"].startswith("its configuration cannot be written: ")
    assert errors["logs,seed=0"].startswith("train: cannot be started: ")
    assert len(errors) == 2
    assert members[3].is_trained


def runs_of(out: Path) -> dict[str, dict]:
    return json.loads((out / "sweep.json").read_text())["runs"]


def test_calls_at_other_seeds_at_a_time_keep_each_others_results(sweep_file):
    """Neither knows of the other at its start; what the other's run failed with stays, until it is done."""
    first, second = (expand(load_sweep(sweep_file, [f"grid.seed=[{seed}]"]), "s")[:1] for seed in (0, 1))
    out = first[0].out.parent
    train(first[0], text_loss=1.0)
    write_results(out, first, {})
    write_results(out, second, {second[0].name: "train: exit status 2: no"})
    assert {name: run["state"] for name, run in runs_of(out).items()} == {
        "plain,seed=0": "finished",
        "plain,seed=1": "failed",
    }
    write_results(out, first, {}, second)
    assert runs_of(out)["plain,seed=1"]["error"] == "train: exit status 2: no"
    train(second[0], text_loss=3.0)
    found = write_results(out, first, {}, second)
    assert found["groups"]["plain"]["text_loss"] == {"mean": 2.0, "std": pytest.approx(2**0.5), "runs": 2}


def test_results_are_written_under_a_lock(sweep_file, monkeypatch):
    """Another process that holds it has a while to release it."""
    members = expand(load_sweep(sweep_file), "s")
    out = members[0].out.parent
    out.mkdir()
    holder = ["flock", "--exclusive", str(out / "sweep.lock"), "sh", "-c", "echo held; read line"]
    with subprocess.Popen(holder, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        monkeypatch.setattr(results, "LOCK_SECONDS", 0.1)
        with pytest.raises(UserError, match=r"sweep\.lock: locked for 0 s by another call"):
            write_results(out, members, {})
        assert not (out / "sweep.json").exists()
        process.communicate(b"\n")
    write_results(out, members, {})
    assert len(runs_of(out)) == 2


def test_the_figures_of_a_run_whose_folder_is_gone_stay(sweep_file):
    """In the table and in its group, whatever it is that later calls ask for."""
    members = expand(load_sweep(sweep_file, ["grid.seed=[0, 1]"]), "s")
    for member in members:
        train(member, text_loss=1.0)
    out = members[0].out.parent
    before = write_results(out, members, {})["runs"]
    shutil.rmtree(members[0].out)
    process = sweep(sweep_file, "--report", "grid.seed=[2]")
    output = process.communicate(timeout=100)[0]
    assert process.returncode == 0, output
    assert runs_of(out).items() >= before.items()
    assert "| plain,seed=0 | finished | 6 of 6 |" in output
    assert "| text_loss | 1 ± 0 (2) | 1 ± 0 (2) |" in output


def test_groups_have_mean_and_spread_over_the_seeds_that_are_finished(sweep_file):
    members = expand(load_sweep(sweep_file, ["grid.seed=[0, 1, 2, 3, 4]"]), "sweep.yaml")
    for member, loss in zip(members, (1.0, 2.0, 6.0, 40.0, 50.0, 5.0), strict=False):
        train(member)
        lines = [{"step": 1, "text_loss": 9.0, "validation_loss": 7.0}, {"step": 2, "text_loss": loss}]
        (member.out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (members[3].out / "starts.json").write_text('[{"ended": "preempted", "step": 2}]')
    found = write_results(
        members[0].out.parent, members, {members[4].name: "train: exit status 1: bad | luck"}
    )
    assert found["runs"]["plain,seed=3"]["metrics"]["text_loss"] == 40.0
    assert found["groups"]["plain"]["text_loss"] == {"mean": 3.0, "std": pytest.approx(7**0.5), "runs": 3}
    assert found["groups"]["causal"]["text_loss"] == {"mean": 5.0, "std": 0.0, "runs": 1}
    assert found["groups"]["plain"]["validation_loss"]["mean"] == 7.0
    table = (members[0].out.parent / "sweep.md").read_text()
    assert "| text_loss | 3 ± 2.6 (3) | 5 (1) |" in table
    assert "| plain,seed=4 | failed: train: exit status 1: bad \\| luck | 6 of 6 |" in table
    assert "| plain,seed=3 | preempted | 2 of 6 |" in table
    assert "| causal,seed=2 | not started | 0 of 6 |" in table


def test_a_run_that_shall_become_longer_is_not_finished(sweep_file):
    member = expand(load_sweep(sweep_file), "sweep.yaml")[0]
    train(member, text_loss=1.0)
    longer = expand(load_sweep(sweep_file, ["runs.plain=[train.num_steps=9]"]), "sweep.yaml")[0]
    found = write_results(member.out.parent, [longer], {})
    assert found["runs"]["plain,seed=0"]["state"] == "not finished"
    assert found["groups"] == {}


def test_a_run_whose_evaluation_is_of_other_options_is_not_evaluated(sweep_file):
    values = "evaluate={suites: [perplexity], options: {texts: [a.txt], max_items: 2}}"
    members = expand(load_sweep(sweep_file, [values]), "sweep.yaml")
    for member in members:
        train(member, text_loss=1.0)
    evaluate(members[0], 2.0)
    for changes, state, expected in (([], "finished", 2.0), (["max_items=1"], "not evaluated", None)):
        changes = [f"evaluate.options.{each}" for each in changes]
        members = expand(load_sweep(sweep_file, [values, *changes]), "sweep.yaml")
        found = write_results(members[0].out.parent, members, {})
        run = found["runs"]["plain,seed=0"]
        assert (run["state"], run["metrics"].get("perplexity/all/perplexity")) == (state, expected)
        assert ("plain" in found["groups"]) == (state == "finished")
        assert "causal" not in found["groups"]


def test_runs_at_a_time_have_a_gpu_each(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5")
    assert [environment(slot, 3).get("CUDA_VISIBLE_DEVICES") for slot in range(3)] == ["3", "GPU-5", "3"]
    assert "CUDA_VISIBLE_DEVICES" not in environment(0, 1), "a run alone may see all"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert [environment(slot, 2)["CUDA_VISIBLE_DEVICES"] for slot in range(2)] == ["", ""], "all are hidden"
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert "OMP_NUM_THREADS" not in environment(0, 2)
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert int(environment(0, 2)["OMP_NUM_THREADS"]) >= 1
