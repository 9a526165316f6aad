"""A real SLURM of two nodes on this machine, with its own keys, ports and folder, while a block runs."""

import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")
NODES = ("n1", "n2")
CONF = """\
ClusterName=megafusion-test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a requeued job waits before it may start again (120 s by default). It must be
# more than KillWait: what is left of a start is killed after that, the next start with it if it has begun.
AuthInfo=socket={folder}/munge.socket,cred_expire=8
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,batch_sched_delay=0
SlurmdTimeout=30
KillWait=5
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=8000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=8000
PartitionName=test Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


def missing_programs() -> list[str]:
    """Parts of SLURM that are not installed; on Debian: `apt-get install slurm-wlm munge`."""
    return [name for name in PROGRAMS if not _find(name)]


def _find(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


class Cluster:
    """A running SLURM; its commands are asked through `ask`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}
        self.daemons: list[subprocess.Popen] = []

    def ask(self, *command: str, check: bool = True) -> str:
        """Output of a SLURM command. Raises CalledProcessError with its message if it fails."""
        done = subprocess.run(
            command, env=os.environ | self.environment, capture_output=True, text=True, check=False
        )
        if check and done.returncode:
            raise AssertionError(f"{' '.join(command)}: status {done.returncode}: {done.stderr}{done.stdout}")
        return done.stdout

    def job(self, job_id: str) -> dict[str, str]:
        """Fields of `scontrol show job`, such as JobState and Restarts."""
        words = self.ask("scontrol", "-o", "show", "job", job_id).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for(self, job_id: str, states: set[str], seconds: float) -> str:
        """The first of these states that the job is in. AssertionError after so many seconds."""
        deadline = time.monotonic() + seconds
        while (state := self.job(job_id)["JobState"]) not in states:
            if time.monotonic() > deadline:
                raise AssertionError(f"job {job_id} is {state} after {seconds:g} s, not {states}")
            time.sleep(0.5)
        return state

    @contextmanager
    def without_controller(self) -> Iterator[None]:
        """slurmctld is away while the block runs, as where its machine restarts; it keeps its jobs."""
        (controller,) = [daemon for daemon in self.daemons if daemon.args[0].endswith("slurmctld")]
        controller.terminate()
        controller.wait(20)
        self.daemons.remove(controller)
        try:
            yield
        finally:
            self.daemons.insert(1, _start(["slurmctld", "-D"], self))

    def logs(self) -> str:
        """The ends of the daemons' logs, for messages of tests."""
        return "\n".join(
            f"== {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-25:])
            for path in sorted(self.folder.glob("*.log"))
        )


@contextmanager
def local_cluster() -> Iterator[Cluster]:
    """Bring SLURM up, and take it down whatever happens: jobs first, then the daemons, then the folder.

    SIGTERM and SIGHUP raise SystemExit in the block, so that they take it down too. In the main thread only.
    """
    before = {
        number: signal.signal(number, lambda number, frame: sys.exit(128 + number))
        for number in (signal.SIGTERM, signal.SIGHUP)
    }
    folder = Path(tempfile.mkdtemp(prefix="megafusion-slurm-"))
    folder.chmod(0o755)  # munged wants its socket's folder to be reached by all
    cluster = Cluster(folder)
    daemons = cluster.daemons
    try:
        _configure(folder)
        munge = [f"--socket={folder}/munge.socket", f"--key-file={folder}/munge.key"]
        munge += [f"--pid-file={folder}/munge.pid", f"--log-file={folder}/munge.log"]
        munge += [f"--seed-file={folder}/munge.seed", "--foreground"]
        daemons.append(_start(["munged", *munge], cluster))
        _wait_until(lambda: (folder / "munge.socket").exists(), daemons, cluster)
        daemons.append(_start(["slurmctld", "-D"], cluster))
        daemons += [_start(["slurmd", "-D", "-N", node], cluster) for node in NODES]
        _wait_until(
            lambda: cluster.ask("sinfo", "-h", "-N", "-o", "%t", check=False).split() == ["idle", "idle"],
            daemons,
            cluster,
        )
        yield cluster
    finally:
        if len(daemons) > 1:
            # Nothing may start again while jobs are ended.
            cluster.ask("scontrol", "update", "PartitionName=test", "State=DOWN", check=False)
            cluster.ask("scancel", f"--user={getpass.getuser()}", check=False)
            deadline = time.monotonic() + 30
            while cluster.ask("squeue", "-h", check=False) and time.monotonic() < deadline:
                time.sleep(0.5)
        for daemon in reversed(daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in daemons:
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        _kill_what_is_left(cluster)
        shutil.rmtree(folder, ignore_errors=True)
        for number, handler in before.items():
            signal.signal(number, handler)


def _kill_what_is_left(cluster: Cluster) -> None:
    """Steps outlive slurmd by design; theirs, and nobody else's, name this cluster's slurm.conf."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.pid != os.getpid() and cluster.environment.items() <= process.environ().items():
                process.kill()


def _configure(folder: Path) -> None:
    for name in ("state", "spool-n1", "spool-n2"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(128))
    values = {"host": socket.gethostname().split(".")[0], "user": getpass.getuser(), "folder": folder}
    (folder / "slurm.conf").write_text(CONF.format(ports=_free_ports(3), **values))


def _free_ports(count: int) -> list[int]:
    taken = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in taken]
    for server in taken:
        server.close()
    return ports


def _start(command: list[str], cluster: Cluster) -> subprocess.Popen:
    program = _find(command[0])
    assert program, command
    output = (cluster.folder / f"{command[0]}-{command[-1].strip('-')}.out.log").open("w")
    return subprocess.Popen(
        [program, *command[1:]], env=os.environ | cluster.environment, stdout=output, stderr=output
    )


def _wait_until(condition, daemons: list[subprocess.Popen], cluster: Cluster, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        ended = [daemon.args[0] for daemon in daemons if daemon.poll() is not None]
        if ended or time.monotonic() > deadline:
            raise AssertionError(f"SLURM does not come up ({ended or 'no answer'}):\n{cluster.logs()}")
        time.sleep(0.2)
