"""Submitting a job to SLURM."""

import re
import shutil
import subprocess

from megafusion.errors import UserError
from megafusion.launch.job import Job
from megafusion.storage import write_file


def submit(job: Job, script: str, config: str) -> str:
    """Write a job's script and frozen configuration (YAML) and submit it; return how to follow it.

    Raises UserError if there is no sbatch or it refuses the job; the files that the run's other jobs read are
    then unchanged.
    """
    if not shutil.which("sbatch"):
        raise UserError(
            "sbatch is not on the PATH: launch from a login node, or look at the job with --dry-run"
        )
    (job.run / "logs").mkdir(parents=True, exist_ok=True)
    write_file(job.config, config)
    write_file(job.script, script)
    queued = _queued(job)
    job_id = _sbatch(job)
    # A job that ends reads here whether a newer one has replaced it.
    write_file(job.run / "launch" / "job", f"{job_id}\n")
    return _instructions(job, job_id, queued)


def _sbatch(job: Job) -> str:
    done = subprocess.run(
        ["sbatch", "--parsable", str(job.script)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        shutil.rmtree(job.script.parent)
        raise UserError(f"sbatch refused the job, which --dry-run shows: {done.stderr.strip()}")
    job_id = done.stdout.strip().split(";")[0]  # "id" or "id;cluster"
    if not re.fullmatch(r"\d+", job_id):
        raise RuntimeError(f"sbatch answered {done.stdout!r}, which is not a job id")
    return job_id


def _queued(job: Job) -> list[str]:
    """Ids of this run's jobs that are already queued or running."""
    done = subprocess.run(
        ["squeue", "--noheader", "--me", "--format=%A", f"--name={job.name}"],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.split()


def _instructions(job: Job, job_id: str, queued: list[str]) -> str:
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
