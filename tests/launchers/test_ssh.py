"""deepspeed.sh on two machines of a hostfile: this one under two names, through pdsh and a real sshd."""

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import yaml

from megafusion.resilience.attempts import read_attempts
from tests.launchers.test_launch import ENVIRONMENT, LAUNCHERS
from tests.support.small import ROOT

SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (SSHD and shutil.which("pdsh")), reason="no sshd or pdsh (apt-get install openssh-server pdsh)"
    ),
]
SERVER = """\
Port {port}
ListenAddress 127.0.0.1
HostKey {folder}/host
AuthorizedKeysFile {folder}/user.pub
PidFile none
UsePAM no
StrictModes no
PasswordAuthentication no
"""
CLIENT = """\
Host localhost 127.0.0.1
  Port {port}
  IdentityFile {folder}/user
  IdentitiesOnly yes
  UserKnownHostsFile {folder}/known
  StrictHostKeyChecking no
  LogLevel ERROR
"""


@contextmanager
def ssh_server(folder: Path) -> Iterator[Path]:
    """Run an sshd on loopback with its own keys; yields the client's configuration."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        values = {"port": free.getsockname()[1], "folder": folder}
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    (folder / "server").write_text(SERVER.format(**values))
    (folder / "client").write_text(CLIENT.format(**values))
    Path("/run/sshd").mkdir(exist_ok=True)  # sshd needs it for connections without a user
    command = [SSHD, "-D", "-f", str(folder / "server"), "-E", str(folder / "log")]
    with subprocess.Popen(command) as server:
        try:
            yield folder / "client"
        finally:
            server.terminate()


def test_a_lost_rank_on_another_machine_restarts_all(run_values, tmp_path):
    run = Path(run_values["out"])
    run_values["train"]["num_steps"] = 60
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(run_values))
    (tmp_path / "hosts").write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    keys = tmp_path / "ssh"
    keys.mkdir()
    # The environment of the processes comes from the site alone.
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "DS_ACCELERATOR"}
    with socket.create_server(("127.0.0.1", 0)) as free:
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    with ssh_server(keys) as client:
        environment |= {"PDSH_SSH_ARGS_APPEND": f"-F {client}", "MEGAFUSION_SITE": "local-test"}
        command = [LAUNCHERS / "deepspeed.sh", tmp_path / "hosts", tmp_path / "config.yaml"]
        with subprocess.Popen(
            [*map(str, command), "model.image_sizes=[[32,32]]", f"out={run}"],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            deadline = time.monotonic() + 120
            while not (run / "checkpoints/step-00000003").is_dir():
                assert time.monotonic() < deadline
                assert process.poll() is None
                time.sleep(0.1)
            os.kill(rank_of_run(run, 1), signal.SIGKILL)
            output = process.communicate(timeout=180)[0]
    assert process.returncode == 0, output
    assert "restarting from step-000000" in output
    lines = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines == list(range(1, 61))
    assert [attempt["start"][-2:] for attempt in read_attempts(run)] == [":1", ":2"]


def rank_of_run(run: Path, rank: int) -> int:
    """The process of a rank of a run, which sshd has started."""
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if (
            f"out={run}" in words
            and words[1:3] == ["-m", "megafusion.cli"]
            and process.environ()["RANK"] == str(rank)
        ):
            return process.pid
    raise AssertionError(f"no rank {rank}")
