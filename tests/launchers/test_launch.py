"""`megafusion launch` and the scripts of launchers/, without SLURM."""

import json
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from megafusion.cli import app, main
from megafusion.errors import ExitStatus, UserError
from megafusion.launch.site import Site
from megafusion.resilience.attempts import START, Attempts, read_attempts
from tests.support.container import program
from tests.support.small import ROOT

LAUNCHERS = ROOT / "launchers"
SCRIPTS = sorted([*LAUNCHERS.glob("*.sh"), *LAUNCHERS.glob("slurm/*")])
ENVIRONMENT = os.environ | {
    "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
    "MEGAFUSION_PYTHON": sys.executable,
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
}


def launch(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["launch", *arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def common(script: str, *arguments: str) -> subprocess.CompletedProcess:
    """Run a line of shell after sourcing common.sh."""
    line = f'. "{LAUNCHERS}/common.sh"; {script}'
    return subprocess.run(
        ["bash", "-c", line, "bash", *arguments], capture_output=True, text=True, check=False
    )


@pytest.fixture
def config_file(run_values, tmp_path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(run_values))
    return path


def test_scripts_parse_and_the_ones_to_start_are_executable():
    assert len(SCRIPTS) >= 8
    for script in SCRIPTS:
        subprocess.run(["bash", "-n", str(script)], check=True)
        assert os.access(script, os.X_OK) == (script.suffix == ".sh" and script.name != "common.sh"), script


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_shellcheck_finds_nothing():
    done = subprocess.run(["shellcheck", "-x", *map(str, SCRIPTS)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_job_script_is_complete_and_has_no_value_of_the_configuration(config_file, tmp_path):
    evil = "telemetry.wandb_project=$(touch evil);touch evil"
    changes = [evil, "telemetry.trackers=[wandb]", "train.global_batch_size=48", "data.num_streams=48"]
    script = launch(
        str(config_file), *changes, "--site", "example", "--nodes", "3", "--time", "90", "--dry-run"
    )
    assert "evil" not in script
    options, _, _ = script.partition("\nset -u\n")
    expected = {"nodes=3", "ntasks-per-node=8", "gpus-per-node=8", "partition=gpu", "requeue", "time=90"}
    found = {line.removeprefix("#SBATCH --") for line in options.splitlines() if line.startswith("#SBATCH")}
    assert expected <= found
    assert f"output={tmp_path}/run/logs/job-%j.log" in found
    assert re.search(rf"^set -- {tmp_path}/run/launch/[\d-]+/config.yaml$", options, re.MULTILINE)
    # sbatch stops reading options at the first command.
    assert options.rindex("#SBATCH") < options.index("\nexport ")
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert not (tmp_path / "run").exists()


def test_missing_files_are_reported_before_the_job_is_submitted(config_file):
    changes = ["data.vae=no/vae", "data.sources.text.path=no/text", "train.num_steps=2"]
    changes += ["--site", "local-test", "--dry-run"]
    result = CliRunner().invoke(app, ["launch", str(config_file), *changes])
    assert [re.split(" not (found|below)", line)[0] for line in result.stderr.splitlines()] == [
        "warning: optimizer.num_warmup_steps 2 is",
        "warning: data.sources.text.path no/text",
        "warning: data.vae no/vae",
    ]


def test_a_job_is_named_after_its_run(config_file, tmp_path):
    def name(out: str) -> str:
        script = launch(str(config_file), f"out={out}", "--site", "local-test", "--dry-run")
        return [line for line in script.splitlines() if line.startswith("#SBATCH --job-name=")][-1]

    assert name(f"{tmp_path}/a") == name(f"{tmp_path}/a/") != name(f"{tmp_path}/b")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--site", "nowhere"], r"nowhere.env: no such site file; there are example, local-test"),
        (
            ["out=/tmp/$(touch evil)", "--site", "example"],
            r"out '/tmp/\$\(touch evil\)': launchers take paths",
        ),
        (["out=/tmp/a b", "--site", "example"], "out '/tmp/a b': launchers take"),
        (["--site", "local-test", "--time", "1; touch evil"], "--time '1; touch evil': write minutes"),
        (["--site", "local-test", "--launcher", "mpirun"], "--launcher is srun or deepspeed, not 'mpirun'"),
        (["--site", "local-test", "--nodes", "3"], r"not a multiple of train.micro_batch_size 2 x 3 data"),
        (
            ["--site", "local-test", "parallel.tensor=2"],
            "the world has 1 ranks, which is not a multiple of 2",
        ),
    ],
)
def test_an_invalid_launch_is_refused_before_anything_is_written(config_file, tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        launch(str(config_file), *arguments, "--dry-run")
    assert not (tmp_path / "run").exists()


def test_without_sbatch_the_message_names_the_way_out(config_file, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"sbatch is not on the PATH: .* --dry-run"):
        launch(str(config_file), "--site", "local-test")


@pytest.mark.skipif(not shutil.which("sbatch"), reason="sbatch is not installed (apt-get install slurm-wlm)")
def test_a_refused_launch_changes_no_file_of_earlier_jobs(config_file, run_values, tmp_path, monkeypatch):
    """Refused because of the run's recipe, and by sbatch, which has no cluster here."""
    (tmp_path / "slurm.conf").write_text("Nonsense=1\n")
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    run = tmp_path / "run"
    earlier = run / "launch/20260101-000000-1/config.yaml"
    earlier.parent.mkdir(parents=True)
    for path in (earlier, run / "config.yaml"):
        path.write_text(yaml.safe_dump(run_values))

    def files() -> dict[str, str]:
        return {str(path): path.read_text() for path in run.rglob("*") if path.is_file()}

    before = files()
    with pytest.raises(UserError, match=r"holds a run with other values of seed \(see its"):
        launch(str(config_file), "seed=7", "--site", "local-test")
    assert files() == before
    with pytest.raises(UserError, match=r"sbatch refused the job, .*: [^$]*configuration file"):
        launch(str(config_file), "telemetry.log_every=2", "--site", "local-test")
    assert files() == before


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("two words", "2: 'two words' is not of the form KEY=VALUE"),
        ("A='open", "2: No closing quotation; quote values"),
        ("HOME2=$HOME", r"2: '\$' in the value of HOME2; nothing but ~ is expanded"),
        ("A='`touch evil`'", "2: '`' in the value of A"),
        ("A='~/x'", "2: ~ in the value of A is expanded at its start, without quotes; write it out"),
        ("A=/x:~/y", "2: ~ in the value of A is expanded at its start"),
        ("SBATCH_WRAP=evil", "2: SBATCH_WRAP: a site sets account, .*, and not wrap"),
        ("SBATCH_PARTITION='a b'", "2: 'a b' is not a valid value of sbatch's --partition"),
        ("WORLD_SIZE=8", "2: WORLD_SIZE is set by the launcher"),
        ("MASTER_ADDR=a", "name the first node's address in MEGAFUSION_MASTER_ADDR"),
        *[
            (f"{name}=abc", rf"2: {name} looks like a secret, .* export it in the shell that you submit from")
            for name in ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "db_password", "MY_APIKEY")
        ],
        ("MEGAFUSION_RANKS_PER_NODE=0", "MEGAFUSION_RANKS_PER_NODE is required, a number .*got '0'"),
        ("MEGAFUSION_MAX_STARTS=5", "MEGAFUSION_MAX_STARTS was replaced by .* resilience.max_crashes"),
        ("MEGAFUSION_LAUNCHER=ssh", "MEGAFUSION_LAUNCHER is srun or deepspeed, not 'ssh'"),
        ("MEGAFUSION_CONTAINER=docker", "MEGAFUSION_CONTAINER is none, apptainer, enroot; not 'docker'"),
        ("MEGAFUSION_CONTAINER=enroot", "MEGAFUSION_CONTAINER=enroot needs MEGAFUSION_CONTAINER_IMAGE"),
    ],
)
def test_a_site_file_is_refused_by_line(tmp_path, line, message):
    path = tmp_path / "site.env"
    path.write_text(f"MEGAFUSION_RANKS_PER_NODE=8\n{line}\n")
    with pytest.raises(UserError, match=message):
        Site.load(str(path))


def test_a_name_that_only_resembles_a_secret_is_accepted(tmp_path):
    path = tmp_path / "site.env"
    path.write_text("MEGAFUSION_RANKS_PER_NODE=8\nNCCL_IB_PKEY=1\nTOKENIZERS_PARALLELISM=false\n")
    assert Site.load(str(path)).environment.keys() >= {"NCCL_IB_PKEY", "TOKENIZERS_PARALLELISM"}


def assert_a_shell_reads_alike(site: Path) -> None:
    """read_site of the launchers and Site.load find the same values."""
    expected = Site.load(str(site)).environment
    line = f'. "{LAUNCHERS}/common.sh"; MEGAFUSION_ROOT={ROOT}; read_site && env -0'
    environment = {"MEGAFUSION_SITE": str(site), "HOME": os.environ["HOME"], "PATH": os.environ["PATH"]}
    done = subprocess.run(["bash", "-euc", line], env=environment, capture_output=True, check=True)
    found = dict(pair.split("=", 1) for pair in done.stdout.decode().split("\0") if pair)
    assert expected == {name: found[name] for name in expected}


@pytest.mark.parametrize("site", sorted(LAUNCHERS.glob("sites/*.env")), ids=lambda path: path.stem)
def test_a_shell_reads_a_site_file_alike(site):
    assert_a_shell_reads_alike(site)


texts = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"], exclude_characters="$`\\~"))
values_of_a_site = st.one_of(
    texts.map(shlex.quote),
    texts.map(lambda text: '"' + text.replace('"', " ") + '"'),
    st.from_regex(r"~/[\w./+:=,-]*", fullmatch=True),
)


@settings(max_examples=40)
@given(st.lists(values_of_a_site), st.sampled_from(["\n", "\r\n"]), st.sampled_from(["", "\ufeff"]))
def test_a_shell_reads_any_site_file_alike(tmp_path_factory, values, line_end, mark):
    lines = ["MEGAFUSION_RANKS_PER_NODE=1", "# A comment", *(f"V{n}={v}" for n, v in enumerate(values)), ""]
    site = tmp_path_factory.mktemp("site") / "site.env"
    site.write_bytes((mark + line_end.join(lines)).encode())
    assert_a_shell_reads_alike(site)


def test_a_site_is_found_below_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.env").write_text("MEGAFUSION_RANKS_PER_NODE=3\nMEGAFUSION_PYTHON=~/venv/bin/python\n")
    monkeypatch.setenv("MEGAFUSION_SITE", "~/mine.env")
    monkeypatch.setenv("MEGAFUSION_SETUP", "~/setup.sh")
    (tmp_path / "setup.sh").write_text("export WAS_SET_UP=yes\n")
    assert Site.load("~/mine.env").environment["MEGAFUSION_PYTHON"] == f"{tmp_path}/venv/bin/python"
    output = common(f"MEGAFUSION_ROOT={ROOT}; read_site; echo $MEGAFUSION_PYTHON $WAS_SET_UP").stdout
    assert output.split() == [f"{tmp_path}/venv/bin/python", "yes"]


def test_a_site_file_that_is_not_utf_8_is_refused(tmp_path):
    (tmp_path / "site.env").write_bytes(b"# caf\xe9\n")
    with pytest.raises(UserError, match=r"site\.env: is not UTF-8"):
        Site.load(str(tmp_path / "site.env"))


@pytest.mark.parametrize("cpus", [None, "16"])
@pytest.mark.parametrize(
    ("script", "launcher", "factor"),
    [("train", "srun", 1), ("train", "deepspeed", 4), ("evaluate", "", 1), ("preprocess", "", 1)],
)
def test_every_job_hands_its_environment_and_cores_to_srun(tmp_path, script, launcher, factor, cpus):
    """srun inherits neither --cpus-per-task (since SLURM 22.05) nor, after sbatch --export, variables."""
    program(tmp_path / "bin/srun", 'printf "%s\\n" "$@"\n')
    program(tmp_path / "bin/scontrol", "echo JobState=COMPLETED\n")
    slurm = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(tmp_path), "MEGAFUSION_ROOT": str(ROOT)}
    slurm |= {"SLURM_JOB_NODELIST": "n1", "SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS_PER_NODE": "4"}
    slurm |= {"SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_TASK_COUNT": "2", "MEGAFUSION_LAUNCHER": launcher}
    slurm |= {"MEGAFUSION_RUN": str(tmp_path / "run"), "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    slurm |= {"SLURM_CPUS_PER_TASK": cpus} if cpus else {}
    done = subprocess.run(
        ["bash", LAUNCHERS / f"slurm/{script}.sbatch", "config.yaml"],
        env=ENVIRONMENT | slurm,
        capture_output=True,
        text=True,
        timeout=60,
    )
    options = done.stdout.splitlines()
    assert "--export=ALL" in options, done.stderr
    given_cpus = [option for option in options if option.startswith("--cpus-per-task")]
    assert given_cpus == ([f"--cpus-per-task={16 * factor}"] if cpus else [])


@pytest.mark.parametrize("script", ["train", "evaluate", "preprocess"])
def test_a_job_without_arguments_shows_where_its_own_are_described(tmp_path, script):
    slurm = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(tmp_path), "MEGAFUSION_ROOT": str(ROOT)}
    done = subprocess.run(
        ["bash", LAUNCHERS / f"slurm/{script}.sbatch"],
        env=ENVIRONMENT | slurm,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert f"see the head of launchers/slurm/{script}.sbatch" in done.stderr


@pytest.mark.parametrize(
    ("status", "restarts"),
    [(0, False), (1, False), (2, False), (75, True), (137, True), (138, True), (143, True), (247, True)],
)
def test_what_an_exit_status_means(tmp_path, status, restarts):
    assert may_restart(tmp_path, status) == restarts


def may_restart(run: Path, status: int) -> bool:
    script = 'MEGAFUSION_START=7:2; may_restart "$1" "$2"'
    return common(script, str(status), str(run)).returncode == 0


def test_exit_statuses_are_the_same_in_the_shell_and_in_python():
    output = common('echo "$EXIT_FAILED $EXIT_REFUSED $EXIT_RETRY"').stdout
    assert output.split() == [str(int(s)) for s in (ExitStatus.FAILED, ExitStatus.REFUSED, ExitStatus.RETRY)]
    numbers = re.compile(r"(exit|-eq|-ne|status=)\s*(1|2|75)\b")
    for script in SCRIPTS:
        code = [line for line in script.read_text().splitlines() if not line.startswith("#")]
        assert not numbers.search("\n".join(code)), script


def test_a_command_that_could_not_be_started_is_not_restarted(tmp_path, monkeypatch):
    """ssh and apptainer exit with 255 then; a trainer that ssh has lost has recorded its start."""
    assert not may_restart(tmp_path, 255)
    for start, is_this in (("7:1", False), ("7:2", True)):
        monkeypatch.setenv(START, start)
        attempts = Attempts(tmp_path)
        attempts.claim()
        attempts.begin(1, 0)
        assert may_restart(tmp_path, 255) == is_this
        attempts.end("crashed")


def test_a_crash_loop_before_the_trainer_records_anything_ends(config_file, tmp_path):
    """The process dies as torch is loaded, at each of three starts; the fourth is refused."""
    fake = tmp_path / "fake/torch"
    fake.mkdir(parents=True)
    (fake / "__init__.py").write_text("import os\nos.kill(os.getpid(), 9)\n")
    done = subprocess.run(
        [LAUNCHERS / "local.sh", "1", config_file],
        env=ENVIRONMENT | {"PYTHONPATH": str(fake.parent)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    output = " ".join((done.stdout + done.stderr).split())
    assert done.returncode == ExitStatus.FAILED, output
    assert output.count("exit status 137; restarting from none") == 3
    assert "crash loop: the last 3 attempts crashed without a checkpoint after step 0;" in output


def test_a_rank_takes_its_number_from_slurm_and_becomes_the_command(tmp_path):
    slurm = {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4"}
    command = [
        str(LAUNCHERS / "rank.sh"),
        str(tmp_path),
        "bash",
        "-c",
        "echo $RANK $LOCAL_RANK $WORLD_SIZE $$; exit 75",
    ]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    with subprocess.Popen(command, env=environment | slurm) as process:
        assert process.wait(10) == 75
    log = (tmp_path / "logs/rank-00003.log").read_text().splitlines()
    assert log[-1] == f"3 1 4 {process.pid}"
    # a launcher's own numbers have precedence
    other = {"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "8"}
    subprocess.run([*command[:-1], "echo $RANK"], env=environment | slurm | other, check=True)
    assert (tmp_path / "logs/rank-00002.log").read_text().splitlines()[-1] == "2"


def world_writable(folder: Path) -> list[Path]:
    paths = [folder, *folder.rglob("*")]
    return [path for path in paths if path.stat().st_mode & stat.S_IWOTH]


@pytest.mark.full
def test_local_sh_trains_restarts_after_a_lost_rank_and_leaves_nothing_world_writable(config_file, tmp_path):
    """With umask 0, as on some clusters."""
    run = tmp_path / "run"
    command = [
        str(LAUNCHERS / "local.sh"),
        "2",
        str(config_file),
        "train.num_steps=30",
        "checkpoint.every=3",
    ]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=ENVIRONMENT,
        umask=0,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        deadline = time.monotonic() + 120
        while not (run / "checkpoints/step-00000003").is_dir():
            assert time.monotonic() < deadline
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.05)
        os.kill(rank_of(process.pid, 0), signal.SIGKILL)  # the one that has locked the run folder
        output = process.communicate(timeout=150)[0]
    finally:
        process.kill()
    assert process.returncode == 0, output
    assert "restarting from step-000000" in output
    assert "step 30" in output  # rank 0's log is shown
    first, second = read_attempts(run)
    assert [attempt["start"].partition(":")[2] for attempt in (first, second)] == ["1", "2"]
    assert (first["resumed_at"], first["ended"], second["ended"]) == (0, "crashed", "finished")
    assert 3 <= second["resumed_at"] < 30
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 30
    assert "rank 1 of 2" in (run / "logs/rank-00001.log").read_text()
    assert world_writable(run) == []


def test_the_command_removes_world_write_permission_and_keeps_the_rest_of_the_umask(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["megafusion", "--version"])
    before = os.umask(0o020)
    try:
        with pytest.raises(SystemExit):
            main()
    finally:
        left = os.umask(before)
    assert left == 0o022


def rank_of(launcher: int, rank: int) -> int:
    """The process of a launcher's rank."""
    import psutil

    for process in psutil.Process(launcher).children():
        if process.environ().get("RANK") == str(rank):
            return process.pid
    raise AssertionError(f"no rank {rank}")


@pytest.mark.parametrize("script", ["local.sh", "deepspeed.sh"])
def test_a_wrong_call_shows_an_example(script, tmp_path):
    done = subprocess.run([str(LAUNCHERS / script)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Example: launchers/" in done.stderr


def test_deepspeed_sh_refuses_white_space(config_file, tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_text("localhost slots=1\n")
    command = [str(LAUNCHERS / "deepspeed.sh"), str(hosts), str(config_file), "telemetry.wandb_project=a b"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "telemetry.wandb_project=a b: pdsh cannot pass white space" in done.stderr


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"MEGAFUSION_SITE": "nowhere"}, f"{LAUNCHERS}/sites/nowhere.env: no such site file"),
        ({"MEGAFUSION_SITE": "nowhere.env"}, "MEGAFUSION_SITE: nowhere.env: no such site file"),
        ({"MEGAFUSION_SETUP": "./setup.sh"}, "MEGAFUSION_SETUP: ./setup.sh: no such file"),
        ({"MEGAFUSION_SETUP": "failing"}, "MEGAFUSION_SETUP: failing: ended with status 3"),
        (
            {"MEGAFUSION_SETUP": "windows"},
            "MEGAFUSION_SETUP: windows: has Windows line ends; convert them: sed",
        ),
    ],
)
@pytest.mark.parametrize(
    "script",
    ["local.sh", "deepspeed.sh", "slurm/train.sbatch", "slurm/evaluate.sbatch", "slurm/preprocess.sbatch"],
)
def test_a_site_that_cannot_be_read_ends_every_launcher(config_file, tmp_path, script, values, message):
    (tmp_path / "failing").write_text(": ${NOT_SET_AT_ALL}\nreturn 3\n")
    (tmp_path / "windows").write_bytes(b"export A=b\r\n")
    (tmp_path / "hosts").write_text("localhost slots=1\n")
    first = {"local.sh": ["1"], "deepspeed.sh": ["hosts"]}.get(script, [])
    slurm = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(tmp_path), "MEGAFUSION_ROOT": str(ROOT)}
    done = subprocess.run(
        ["bash", LAUNCHERS / script, *first, config_file],
        cwd=tmp_path,
        env=ENVIRONMENT | slurm | values,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("site", ["local-test", "mine.env", "./mine.env"])
def test_a_launcher_finds_the_same_site_as_megafusion_launch(tmp_path, monkeypatch, site):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.env").write_text("MEGAFUSION_RANKS_PER_NODE=2\n")
    monkeypatch.setenv("MEGAFUSION_SITE", site)
    output = common(f"MEGAFUSION_ROOT={ROOT}; read_site; echo $MEGAFUSION_RANKS_PER_NODE").stdout
    assert output.strip() == Site.load(site).environment["MEGAFUSION_RANKS_PER_NODE"]


def test_a_job_in_a_container_runs_the_image_s_python(config_file, tmp_path):
    site = tmp_path / "site.env"
    site.write_text(
        "MEGAFUSION_RANKS_PER_NODE=1\nMEGAFUSION_CONTAINER=apptainer\nMEGAFUSION_CONTAINER_IMAGE=a.sif\n"
    )
    arguments = [str(config_file), "--site", str(site), "--dry-run"]
    assert "\nexport MEGAFUSION_PYTHON=python3\n" in launch(*arguments)
    assert f"\nexport MEGAFUSION_PYTHON={sys.executable}\n" in launch(
        *arguments[:2], "local-test", "--dry-run"
    )
