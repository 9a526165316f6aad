"""A SLURM job of a run, its script (launchers/slurm/train.sbatch with options and values), its submission."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from megafusion.errors import UserError
from megafusion.launch.run_folder import plain_path
from megafusion.launch.site import CONTAINERS, Site, check_launcher
from megafusion.storage import write_file

ROOT = Path(__file__).parents[2]
TEMPLATE = ROOT / "launchers" / "slurm" / "train.sbatch"
MARKER = "# -- megafusion launch puts options and values here --\n"

_TIME = re.compile(r"(\d+-)?\d+(:\d\d){0,2}")


@dataclass(frozen=True)
class Job:
    """A job of a run; its values are validated."""

    run: Path
    """Run folder: an absolute path without characters that a shell reads."""
    site: Site
    nodes: int
    launcher: str
    time: str | None
    """Time limit in sbatch's form; None for the site's."""
    submission: str
    """Name of this submission's folder, which a job reads again at each of its starts."""

    @property
    def config(self) -> Path:
        """The frozen configuration of this submission."""
        return self.run / "launch" / self.submission / "config.yaml"

    @property
    def script(self) -> Path:
        return self.config.with_name("train.sbatch")

    @property
    def world_size(self) -> int:
        return self.nodes * self.site.ranks_per_node

    @property
    def name(self) -> str:
        """The job's name, the same for every job of a run: SLURM runs one job of a name at a time."""
        return "megafusion:" + str(self.run).strip("/").replace("/", ":")


def make_job(out: Path, site_name: str, nodes: int, launcher: str | None, time: str | None) -> Job:
    """Validate the options of `megafusion launch`. Raises UserError naming the one that is invalid."""
    site = Site.load(site_name)
    if time is not None and not _TIME.fullmatch(time):
        raise UserError(f"--time {time!r}: write minutes, H:MM:SS or D-HH:MM:SS")
    check_launcher(launcher := launcher or site.launcher, "--launcher")
    submission = f"{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}"
    return Job(plain_path(out, "out"), site, nodes, launcher, time, submission)


def render(job: Job) -> str:
    """The script for sbatch. It names the frozen configuration and holds none of its values."""
    options = job_options(job) | {"job-name": job.name, "output": f"{job.run}/logs/job-%j.log"}
    values = job_values(job) | {"MEGAFUSION_RUN": str(job.run)}
    return fill(TEMPLATE, options, values, [f"set -- {shlex.quote(str(job.config))}"])


def job_options(job: Job) -> dict[str, str]:
    """sbatch's options that a job takes from its site and its size."""
    options = job.site.options | ({"time": job.time} if job.time else {})
    return options | {"nodes": str(job.nodes), "ntasks-per-node": str(job.site.ranks_per_node)}


def job_values(job: Job) -> dict[str, str]:
    """Environment variables of a job, the run's folder excepted."""
    # A container has its own Python.
    in_container = job.site.environment.get("MEGAFUSION_CONTAINER", CONTAINERS[0]) != CONTAINERS[0]
    values = {"MEGAFUSION_PYTHON": "python3" if in_container else sys.executable} | job.site.environment
    return values | {"MEGAFUSION_ROOT": str(ROOT), "MEGAFUSION_LAUNCHER": job.launcher}


def fill(template: Path, options: Mapping[str, str], values: Mapping[str, str], commands: list[str]) -> str:
    """A template's job script with options of sbatch, variables, and lines of shell, quoted by the caller."""
    lines = [f"#SBATCH --{name}={value}" for name, value in sorted(options.items())]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in sorted(values.items())]
    lines += ["unset MEGAFUSION_SITE", *commands]
    before, marker, after = template.read_text().partition(MARKER)
    assert marker, f"{template}: the line {MARKER!r} is gone"
    return before + "\n".join(lines) + "\n" + after


def submit(job: Job, script: str, config: str) -> str:
    """Write a job's script and frozen configuration (YAML) and submit it; returns how to follow it.

    UserError without sbatch, or if it refuses the job; the files of the run's other jobs are then unchanged.
    """
    refuse_without_sbatch()
    (job.run / "logs").mkdir(parents=True, exist_ok=True)
    write_file(job.config, config)
    write_file(job.script, script)
    queued = queued_jobs(job.name)
    try:
        job_id = sbatch(job.script)
    except UserError:
        shutil.rmtree(job.script.parent)
        raise
    replace_job(job.run, job_id)
    return _instructions(job, job_id, queued)


def refuse_without_sbatch() -> None:
    """UserError on a machine that cannot submit."""
    if not shutil.which("sbatch"):
        raise UserError(
            "sbatch is not on the PATH: launch from a login node, or look at the job with --dry-run"
        )


def queued_jobs(name: str) -> list[str]:
    """Ids of this user's jobs of a name that are queued or running."""
    return _run("squeue", "--noheader", "--me", "--format=%A", f"--name={name}").stdout.split()


def replace_job(run: Path, job_id: str) -> None:
    """Name the newest job of a run: one that ends reads here whether another has replaced it."""
    write_file(run / "launch" / "job", f"{job_id}\n")


def sbatch(script: Path, *options: str) -> str:
    """Submit a script; the job's id. UserError if sbatch refuses it, RuntimeError if its answer is no id."""
    done = _run("sbatch", "--parsable", *options, str(script))
    if done.returncode:
        raise UserError(f"sbatch refused the job, which --dry-run shows: {done.stderr.strip()}")
    job_id = done.stdout.strip().split(";")[0]  # "id" or "id;cluster"
    if not re.fullmatch(r"\d+", job_id):
        raise RuntimeError(
            f"sbatch answered {done.stdout!r}, which is not a job id; the job may be queued: squeue --me"
        )
    return job_id


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _instructions(job: Job, job_id: str, queued: list[str]) -> str:
    """queued: ids of this run's jobs that were queued or running before."""
    lines = [
        f"job {job_id}: {job.world_size} ranks on {job.nodes} nodes, {job.run}",
        "follow it:",
        f"  squeue --job {job_id}",
        f"  tail -F {job.run}/logs/rank-00000.log    # job-{job_id}.log beside it has starts and ends",
        f"  megafusion status {job.run}",
        "save and requeue, or cancel:",
        f"  scancel --signal=USR1 {job_id}",
        f"  scancel {job_id}",
    ]
    for older in queued:
        lines.append(
            f"job {older} of this run is still queued or running; {job_id} starts when it has ended. To end "
            f"that job with a checkpoint: scancel --signal=USR1 {older}"
        )
    return "\n".join(lines)
