"""`megafusion sweep --site`: the arrays' scripts, run by bash with stand-ins for SLURM's commands."""

import os
import subprocess
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from megafusion.cli import app
from megafusion.launch.job import make_job, render, submit
from megafusion.sweep.config import load_sweep
from megafusion.sweep.members import expand
from tests.support.container import program
from tests.sweep.conftest import evaluate, train


def sweep(path: Path, *arguments: str) -> str:
    result = CliRunner().invoke(app, ["sweep", str(path), *arguments])
    assert result.exit_code == 0, result.output + str(result.exception)
    return result.stdout


@pytest.fixture
def evaluated(sweep_file, texts) -> Path:
    """The sweep with an evaluation and a value that no shell may read."""
    values = yaml.safe_load(sweep_file.read_text())
    values["evaluate"] = {"suites": ["perplexity"], "options": {"texts": [str(texts)]}}
    values["overrides"].append("telemetry.trackers=[wandb]")
    values["overrides"].append("telemetry.wandb_project=$(touch evil);touch evil")
    sweep_file.write_text(yaml.safe_dump(values, sort_keys=False))
    return sweep_file


@pytest.fixture
def slurm(tmp_path) -> dict[str, str]:
    """An environment in which sbatch answers 41, 42, ... and srun prints its arguments."""
    program(tmp_path / "bin/sbatch", 'echo "$@" >> "$0.log"; echo $((40 + $(wc -l < "$0.log")))\n')
    program(tmp_path / "bin/srun", 'printf "%s\\n" "$@" "run $MEGAFUSION_RUN start $MEGAFUSION_START"\n')
    program(tmp_path / "bin/squeue", "")
    program(tmp_path / "bin/scontrol", "echo JobState=COMPLETED\n")
    values = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_NODELIST": "n1"}
    values |= {"SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS_PER_NODE": "1", "SLURM_ARRAY_JOB_ID": "41"}
    return os.environ | values | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}


def test_a_dry_run_prints_both_arrays_and_writes_nothing(evaluated):
    output = sweep(evaluated, "--site", "local-test", "--time", "90", "--jobs", "3", "--dry-run")
    assert "evil" not in output
    assert output.count("#SBATCH --array=0,1%3\n") == 2
    assert output.count("#SBATCH --time=90\n") == 2
    assert "singleton\n" not in output
    assert "--suite perplexity" in output
    subprocess.run(["bash", "-n"], input=output, text=True, check=True)
    assert not (evaluated.parent / "sweep").exists()


def test_each_task_of_the_arrays_runs_its_member(evaluated, slurm, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", slurm["PATH"])
    output = sweep(evaluated, "--site", "local-test")
    assert output.startswith("array 41: 2 runs, ")
    assert "array 42: their evaluations, each after its training" in output
    train, evaluate = [line.split() for line in (tmp_path / "bin/sbatch.log").read_text().splitlines()]
    assert evaluate[1] == "--dependency=aftercorr:41"
    for number, name in enumerate(("plain,seed=0", "causal,seed=0")):
        run = tmp_path / "sweep" / name
        assert (run / "launch/job").read_text() == f"41_{number}\n"
        for script in (train[-1], evaluate[-1]):
            done = subprocess.run(
                ["bash", script],
                env=slurm | {"SLURM_ARRAY_TASK_ID": str(number)},
                capture_output=True,
                text=True,
            )
            lines = done.stdout.splitlines()
            if script == train[-1]:
                config = Path(lines[lines.index("train") + 1])
                assert yaml.safe_load(config.read_text())["out"] == str(run)
                assert f"run {run} start 41_{number}:1" in lines, done.stderr
            else:
                words = lines[lines.index("megafusion.cli") + 1 :]
                assert words[:4] == ["evaluate", str(run), "--suite", "perplexity"], done.stderr
                assert Path(words[5]).is_file()
                assert words[7].startswith(f"{run}/evaluation-6-")


def test_a_refused_array_leaves_nothing_and_degrees_must_fill_the_ranks(
    evaluated, slurm, monkeypatch, tmp_path
):
    program(tmp_path / "bin/sbatch", "echo no such partition >&2; exit 1\n")
    monkeypatch.setenv("PATH", slurm["PATH"])
    result = CliRunner().invoke(app, ["sweep", str(evaluated), "--site", "local-test"])
    assert "sbatch refused the job, which --dry-run shows: no such partition" in str(result.exception)
    assert list((tmp_path / "sweep/sweep.launch").iterdir()) == []
    assert not (tmp_path / "sweep/plain,seed=0").exists()
    result = CliRunner().invoke(app, ["sweep", str(evaluated), "--site", "local-test", "--nodes", "3"])
    assert str(result.exception).startswith("plain,seed=0: ")


def test_a_sweep_whose_runs_are_evaluated_is_done(evaluated):
    """Known by what `megafusion evaluate` writes, because that is all that a task runs."""
    members = expand(load_sweep(evaluated), "sweep.yaml")
    for member in members:
        train(member)
        evaluate(member, 2.0)
    for arguments in ([], ["--dry-run"], ["--dry-run", "--report"]):
        output = sweep(evaluated, "--site", "local-test", *arguments)
        assert output == f"{members[0].out.parent}: every run is done\n"
    assert f"{members[0].out}: 6 steps, perplexity: done\n" in sweep(evaluated, "--dry-run")
    assert "| plain,seed=0 | finished | 6 of 6 |" in sweep(evaluated, "--report")


def test_refused_evaluations_name_the_trainings_that_are_queued(evaluated, slurm, monkeypatch, tmp_path):
    """The same command then submits no second array beside the first."""
    program(tmp_path / "bin/sbatch", '[ "$#" = 2 ] && echo 41 || { echo too many jobs >&2; exit 1; }\n')
    monkeypatch.setenv("PATH", slurm["PATH"])
    result = CliRunner().invoke(app, ["sweep", str(evaluated), "--site", "local-test"])
    assert "too many jobs; the trainings are queued as array 41: when they have ended" in str(
        result.exception
    )
    program(tmp_path / "bin/squeue", '[ "${4#--name=megafusion:}" = "$4" ] || echo 41\n')
    submissions = list((tmp_path / "sweep/sweep.launch").iterdir())
    result = CliRunner().invoke(app, ["sweep", str(evaluated), "--site", "local-test"])
    assert "array 41 of this sweep is queued or running; wait for it" in str(result.exception)
    assert list((tmp_path / "sweep/sweep.launch").iterdir()) == submissions


def test_a_job_that_may_be_queued_keeps_its_configuration(slurm, monkeypatch, tmp_path):
    program(tmp_path / "bin/sbatch", "echo a greeting of the site\n")
    monkeypatch.setenv("PATH", slurm["PATH"])
    job = make_job(tmp_path / "run", "local-test", 1, None, None)
    with pytest.raises(RuntimeError, match=r"a greeting of the site.* the job may be queued: squeue --me"):
        submit(job, render(job), "seed: 0\n")
    assert job.config.read_text() == "seed: 0\n"


def test_a_folder_whose_name_sbatch_would_read_is_refused(evaluated):
    """A % in the name of a log stands for a number there; a sweep on this machine takes it."""
    out = f"out={evaluated.parent / 'half%j'}"
    result = CliRunner().invoke(app, ["sweep", str(evaluated), out, "--site", "local-test", "--dry-run"])
    assert "half%j': launchers take paths of letters, digits and" in str(result.exception)
    assert "half%j/plain,seed=0: 6 steps" in sweep(evaluated, out, "--dry-run")
