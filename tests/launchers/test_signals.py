"""Signals at any moment of a start, containers, exit status of DeepSpeed's launcher: with real trainers."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml

from megafusion.errors import ExitStatus
from megafusion.resilience.attempts import Attempts
from tests.launchers.test_launch import ENVIRONMENT, LAUNCHERS, common
from tests.support.container import make_image, program
from tests.support.small import ROOT

HANDED_ON = (signal.SIGINT, signal.SIGHUP)


@pytest.fixture(autouse=True)
def heed_signals():
    """Started with nohup or in the background of a script, the tests would hand ignored signals on."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in HANDED_ON}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def endless(run_values, tmp_path) -> Path:
    """Configuration of a run that does not end by itself."""
    run_values["train"]["num_steps"] = 10**6
    run_values["checkpoint"] = {"every": 10**6}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(run_values))
    return path


def ended(command: list, environment: dict[str, str], seconds: float) -> tuple[int | None, str]:
    """Exit status and output of a command; None after a timeout. Kills everything that it started."""
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
        kill_group(process.pid)
        return status, process.stdout.read()


def kill_group(leader: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def signal_during(folder: Path, name: str, number: int, signal_name: str) -> str:
    """A PATH on which the number-th call of a program signals the launcher; python3 fails to train once."""
    lines = f"""\
echo >> {folder}/calls
[ $(wc -l < {folder}/calls) -ne {number} ] || kill -{signal_name} $(cat {folder}/pid)
case "$*" in *megafusion.cli*) mkdir {folder}/lost 2> /dev/null && exit {ExitStatus.RETRY};; esac
exec {sys.executable if name == "python3" else shutil.which(name)} "$@"
"""
    return f"{program(folder / 'bin' / name, lines).parent}:{os.environ['PATH']}"


@pytest.mark.parametrize(
    ("program_name", "number", "signal_name"),
    [
        pytest.param("touch", 1, "TERM", id="before the first start"),
        pytest.param("touch", 1, "HUP", id="before the first start, a closed terminal"),
        pytest.param("python3", 2, "USR1", id="before the ranks are started"),
        pytest.param("python3", 4, "USR1", id="before the ranks are restarted"),
    ],
)
def test_local_sh_loses_no_signal_of_a_start(endless, tmp_path, program_name, number, signal_name):
    environment = ENVIRONMENT | {"PATH": signal_during(tmp_path, program_name, number, signal_name)}
    environment["MEGAFUSION_PYTHON"] = "python3" if program_name == "python3" else sys.executable
    command = [
        "bash",
        "-c",
        'echo $$ > "$0"; exec "$@"',
        tmp_path / "pid",
        LAUNCHERS / "local.sh",
        "1",
        endless,
    ]
    status, output = ended(command, environment, 60)
    assert status == ExitStatus.RETRY, output
    assert len((tmp_path / "calls").read_text().splitlines()) >= number
    assert not (tmp_path / "run/metrics.jsonl").exists()


@pytest.mark.parametrize("signal_name", ["TERM", "USR1", "HUP"])
def test_deepspeed_sh_starts_nothing_after_a_signal(endless, tmp_path, signal_name):
    (tmp_path / "hosts").write_text("localhost slots=1\n")
    environment = ENVIRONMENT | {"PATH": signal_during(tmp_path, "mktemp", 1, signal_name)}
    with_pid = ["bash", "-c", 'echo $$ > "$0"; exec "$@"', tmp_path / "pid"]
    status, output = ended(
        [*with_pid, LAUNCHERS / "deepspeed.sh", tmp_path / "hosts", endless], environment, 60
    )
    assert status == ExitStatus.RETRY, output
    assert "cmd = " not in output  # DeepSpeed's runner prints the command


def node_environment(folder: Path) -> dict[str, str]:
    """Environment of node.sh from train.sbatch and SLURM, on the single node of a job."""
    (folder / "run/launch").mkdir(parents=True, exist_ok=True)
    (folder / "hosts").write_text("localhost slots=1\n")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    names = {"SLURM_JOB_ID": "7", "SLURM_NODEID": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return ENVIRONMENT | names | {"MEGAFUSION_HOSTFILE": str(folder / "hosts"), "GLOO_SOCKET_IFNAME": "lo"}


@pytest.mark.full
def test_node_sh_loses_no_signal_while_deepspeed_starts(endless, tmp_path):
    """SLURM signals every process of a node; DeepSpeed's ignore it, and the trainer has not started yet."""
    environment = node_environment(tmp_path)
    train = [sys.executable, "-m", "megafusion.cli", "train", str(endless)]
    with subprocess.Popen(
        [str(LAUNCHERS / "slurm/node.sh"), str(tmp_path / "run"), *train],
        cwd=ROOT,
        env=environment,
        start_new_session=True,
    ) as process:
        try:
            deadline = time.monotonic() + 20
            while not any("deepspeed" in command for command in commands_of(process.pid)):
                assert time.monotonic() < deadline
            os.killpg(process.pid, signal.SIGUSR1)
            assert process.wait(90) == ExitStatus.RETRY
        finally:
            kill_group(process.pid)
    assert not (tmp_path / "run/metrics.jsonl").exists()
    assert list((tmp_path / "run/launch").iterdir()) == []


def rank_program(folder: Path, *ends_on: str) -> Path:
    """A Python whose `megafusion train` and DeepSpeed only wait for a signal, and then end as a trainer."""
    (folder / "rank.py").write_text(f"""\
import os, signal
for name in {ends_on!r}:
    signal.signal(getattr(signal, name), lambda *_: (open("{folder}/saved", "w"), os._exit(75)))
open("{folder}/ready", "w").close()
signal.pause()
""")
    rank = f"{sys.executable} {folder / 'rank.py'}"
    lines = f'case "$*" in *megafusion.cli*) exec {rank};; *) exec {sys.executable} "$@";; esac\n'
    return program(folder / "bin" / "python-of-ranks", lines)


def end_by(command: list, environment: dict, folder: Path, number: int, whole_group: bool) -> None:
    """Signal a launcher while its rank runs, alone or with its process group: both end as they should."""
    with subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True) as process:
        try:
            deadline = time.monotonic() + 30
            while not (folder / "ready").exists():
                assert time.monotonic() < deadline
                assert process.poll() is None
                time.sleep(0.02)
            (os.killpg if whole_group else os.kill)(process.pid, number)
            assert process.wait(30) == ExitStatus.RETRY
        finally:
            kill_group(process.pid)
    assert (folder / "saved").exists()


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("whole_group", [False, True])
def test_local_sh_ends_its_ranks_and_then_with_75(endless, tmp_path, number, whole_group):
    """A closed terminal signals the whole group, also what shows the log."""
    environment = ENVIRONMENT | {"MEGAFUSION_PYTHON": str(rank_program(tmp_path, "SIGTERM", "SIGHUP"))}
    end_by([LAUNCHERS / "local.sh", "1", endless], environment, tmp_path, number, whole_group)


def test_a_process_that_ends_with_the_wait_for_it_has_a_status(tmp_path):
    """bash may lose it: wait returns -1 then, which a maximum of statuses takes for success."""
    script = program(
        tmp_path / "waits",
        f""". {LAUNCHERS / "common.sh"}
        trap 'interrupted=yes' HUP
        {sys.executable} -S -c 'import os, signal
signal.signal(signal.SIGHUP, lambda *_: os._exit(75))
open("{tmp_path}/ready", "w").close()
signal.pause()' &
        status_of $!
        exit "$status"
        """,
    )
    for _ in range(20):
        with subprocess.Popen([script], start_new_session=True) as process:
            while not (tmp_path / "ready").exists():
                time.sleep(0.002)
            (tmp_path / "ready").unlink()
            os.killpg(process.pid, signal.SIGHUP)
            assert process.wait(30) in (75, 129)


def test_node_sh_turns_sighup_into_a_signal_that_ranks_handle(endless, tmp_path):
    """DeepSpeed's launcher must not get it, so the ranks ignore it too, as under nohup."""
    environment = node_environment(tmp_path) | {"MEGAFUSION_PYTHON": str(rank_program(tmp_path, "SIGUSR1"))}
    command = [LAUNCHERS / "slurm/node.sh", tmp_path / "run", "-m", "megafusion.cli", "train", endless]
    end_by(command, environment, tmp_path, signal.SIGHUP, whole_group=True)


def test_deepspeed_sh_ends_its_runner_when_the_terminal_is_closed(endless, tmp_path):
    """The runner would die of the signal, and leave the ranks of the other machines."""
    (tmp_path / "hosts").write_text("localhost slots=1\n")
    environment = ENVIRONMENT | {"MEGAFUSION_PYTHON": str(rank_program(tmp_path, "SIGTERM"))}
    command = [LAUNCHERS / "deepspeed.sh", tmp_path / "hosts", endless]
    end_by(command, environment, tmp_path, signal.SIGHUP, whole_group=True)


@pytest.mark.parametrize("command", ["preprocess", "train-vae"])
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1])
def test_commands_that_resume_end_with_75(command, number, tmp_path):
    config = "configs/preprocess/quickstart.yaml" if command == "preprocess" else "configs/vae/emoji.yaml"
    arguments = [sys.executable, "-m", "megafusion.cli", command, config, f"out={tmp_path / 'out'}"]
    with subprocess.Popen(arguments, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 30
        while not handles(process.pid, number):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(number)
        said = process.communicate(timeout=30)[1]
    assert process.returncode == ExitStatus.RETRY, said
    assert f"stopped by {number.name}; run the same command again" in said


def handles(pid: int, number: int) -> bool:
    """Whether a process has installed a handler."""
    status = Path(f"/proc/{pid}/status").read_text()
    return bool(int(status.partition("SigCgt:")[2].split()[0], 16) >> (number - 1) & 1)


def commands_of(pid: int) -> Iterator[str]:
    """Command lines of the running descendants of a process."""
    for child in children_of(pid):
        with suppress(psutil.Error):
            yield " ".join(child.cmdline())


def children_of(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


# test_launch.py checks quickly that a job in a container runs the image's Python.
@pytest.mark.full
def test_local_sh_trains_in_a_container(run_values, tmp_path):
    run_values["train"] |= {"num_steps": 2}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(run_values))
    status, output = ended([LAUNCHERS / "local.sh", "1", config], ENVIRONMENT | make_image(tmp_path), 90)
    assert status == 0, output
    assert "step 2" in output


@pytest.mark.full
def test_node_sh_trains_in_a_container(run_values, tmp_path):
    run_values["train"] |= {"num_steps": 2}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(run_values))
    image = make_image(tmp_path)
    train = [image["MEGAFUSION_PYTHON"], "-m", "megafusion.cli", "train", config]
    environment = node_environment(tmp_path) | image
    status, output = ended([LAUNCHERS / "slurm/node.sh", tmp_path / "run", *train], environment, 120)
    assert status == 0, output
    assert common('is_done "$1"', str(tmp_path / "run")).returncode == 0


def test_an_exit_status_of_0_needs_the_run_s_record(tmp_path):
    """DeepSpeed's runner returns 0 even if its launcher was killed."""

    def is_done() -> bool:
        return common('is_done "$1"', str(tmp_path)).returncode == 0

    assert not is_done()
    for ending, done in (("finished", True), ("preempted", False), ("crashed", False), ("stopped", True)):
        attempts = Attempts(tmp_path)
        attempts.claim()
        attempts.begin(3, 1)
        assert not is_done()
        attempts.end(ending, 'it output "ended": "finished"')
        assert is_done() == done
    assert len(json.loads((tmp_path / "starts.json").read_text())) == 4
