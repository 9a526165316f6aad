"""The runs of a sweep as processes of this machine, one after another or some at a time."""

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from rich.progress import Progress, TaskID

from megafusion.config import dump_config
from megafusion.errors import ExitStatus
from megafusion.progress import progress_bar
from megafusion.resilience.attempts import START, is_running, read_attempts
from megafusion.storage import write_file
from megafusion.sweep.members import Member

POLL_SECONDS = 0.2
GRACE_SECONDS = 600.0
"""How long a run that is told to stop may take to save."""


@dataclass
class Job:
    """A member's process: its training, then its evaluation."""

    member: Member
    slot: int
    config: Path
    """Its frozen configuration."""
    launch: str
    task: TaskID
    stage: str = ""
    process: subprocess.Popen | None = None
    starts: int = 0
    log: Path = field(default_factory=Path)
    log_start: int = 0
    """Bytes of the log before this start."""

    def next_stage(self) -> str:
        """The first stage that is not done; empty when all are."""
        if not self.member.is_trained:
            return "train"
        return "" if self.member.is_evaluated else "evaluate"

    def start(self, stage: str, jobs: int) -> None:
        """Start a stage. Its output goes to RUN/logs/."""
        self.starts = self.starts + 1 if stage == self.stage else 1
        self.stage, self.log = stage, self.member.out / "logs" / f"{stage}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self.log_start = log.tell()
            log.write(f"== {time.strftime('%Y-%m-%dT%H:%M:%S%z')} {stage}\n".encode())
            log.flush()
            self.process = subprocess.Popen(
                [sys.executable, "-m", "megafusion.cli", *command(self.member, stage, self.config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | environment(self.slot, jobs) | {START: f"{self.launch}:{self.starts}"},
                start_new_session=True,  # Ctrl-C reaches the sweep alone, which stops its runs once
            )

    def may_restart(self, status: int) -> bool:
        """Whether training lost a process; it counts crash loops itself, by MEGAFUSION_START."""
        return self.stage == "train" and (status == ExitStatus.RETRY or status < 0)

    def error(self, status: int) -> str:
        """The failure of the stage, in a line."""
        log = self.log.read_bytes()[self.log_start :].decode(errors="replace")
        lines = [line for line in log.splitlines() if line.strip()]
        said = next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1])
        return f"{self.stage}: exit status {status}: {said.removeprefix('error: ')}"


def command(member: Member, stage: str, config: Path) -> list[str]:
    """Arguments of `megafusion` for a stage of a member."""
    if stage == "train":
        return ["train", str(config)]
    suites = [word for suite in member.suites for word in ("--suite", suite)]
    options = ["--config", str(config.with_name("evaluate.yaml")), "--out", str(member.results)]
    return ["evaluate", str(member.out), *suites, *options]


def freeze(member: Member, folder: Path) -> Path:
    """Write a member's configurations into a folder; the path of the run's."""
    config = folder / member.name / "config.yaml"
    write_file(config, member.config)
    write_file(config.with_name("evaluate.yaml"), dump_config(member.evaluation))
    return config


def environment(slot: int, jobs: int) -> dict[str, str]:
    """Variables of the process in one of the slots: a GPU of its own, and its share of the cores."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = (
        visible.split(",")
        if visible is not None  # empty: all are hidden
        else [path.name[6:] for path in sorted(Path("/dev").glob("nvidia[0-9]*"))]
    )
    found = {"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} if jobs > 1 and gpus else {}
    if jobs > 1 and "OMP_NUM_THREADS" not in os.environ:
        found["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // jobs))
    return found


def run_members(
    members: Sequence[Member],
    folder: Path,
    jobs: int,
    record: Callable[[dict[str, str]], object] = lambda errors: None,
) -> dict[str, str]:
    """Train and evaluate what is not done yet, `jobs` at a time; the errors of those that failed, by name.

    folder: where the configurations are frozen. record: called with the errors so far whenever a run has
    ended. One that fails does not stop the others. When this process is told to stop, so are its runs, which
    save. What `record` raises is printed: the runs go on.
    """
    launch, errors = f"sweep-{os.getpid()}-{int(time.time())}", {}
    waiting, running = deque(members), dict[int, Job]()
    with progress_bar() as progress, ExitStack() as stack:
        total = progress.add_task("sweep", total=len(members), losses="")
        stack.callback(lambda: _stop(running, progress.console.print))
        while waiting or running:
            while waiting and len(running) < jobs:
                member = waiting.popleft()
                if is_running(member.out):
                    errors[member.name] = "another process trains it; run the sweep again when that has ended"
                    progress.advance(total)
                    continue
                try:
                    config = freeze(member, folder)
                except OSError as fault:
                    errors[member.name] = f"its configuration cannot be written: {fault}"
                    progress.advance(total)
                    continue
                slot = min(set(range(jobs)) - set(running))
                task = progress.add_task(member.name, total=member.num_steps, losses="", visible=False)
                running[slot] = Job(member, slot, config, f"{launch}-{member.name}", task)
            for slot, job in list(running.items()):
                if (error := _advance(job, jobs, progress)) is None:
                    continue
                del running[slot]
                progress.remove_task(job.task)
                progress.advance(total)
                if error:
                    errors[job.member.name] = error
                progress.console.print(f"{job.member.name}: {error or 'done'}", markup=False, soft_wrap=True)
                try:
                    record(errors)
                except Exception as fault:  # of another run's files, or the disk: no reason to stop this one
                    said = f"warning: the results are not written: {fault or type(fault).__name__}"
                    progress.console.print(said, markup=False, soft_wrap=True)
            time.sleep(POLL_SECONDS if running else 0)
    return errors


def _advance(job: Job, jobs: int, progress: Progress) -> str | None:
    """Start what comes next in a slot; None while it runs, then its error, empty if all is done."""
    status: int | None = None
    if job.process:
        if (status := job.process.poll()) is None:
            attempts = read_attempts(job.member.out) if job.stage == "train" else []
            progress.update(
                job.task,
                description=f"{job.member.name} {job.stage}",
                completed=attempts[-1]["step"] if attempts else 0,
                total=job.member.num_steps if job.stage == "train" else None,
                visible=True,
            )
            return None
        if status and not job.may_restart(status):
            return job.error(status)
    stage = job.next_stage()
    if not stage:
        return ""
    if status == 0 and stage == job.stage:
        return f"{stage}: ended without being finished; see {job.log}"
    try:
        job.start(stage, jobs)
    except OSError as fault:
        return f"{stage}: cannot be started: {fault}"
    return None


def _stop(running: dict[int, Job], say: Callable[..., None]) -> None:
    """End the processes that still run, with a checkpoint."""
    processes = [job.process for job in running.values() if job.process and job.process.poll() is None]
    if processes:
        say("stopping: each run saves a checkpoint and ends; the same command resumes")
    for process in processes:
        process.send_signal(signal.SIGTERM)
    for process in processes:
        try:
            process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
