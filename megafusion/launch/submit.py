"""The command `megafusion launch`."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path

from megafusion.config import dump_config, load_config
from megafusion.data.shards import MANIFEST
from megafusion.errors import UserError
from megafusion.launch.job import Job, render
from megafusion.launch.run_folder import plain_path
from megafusion.launch.site import Site, check_launcher
from megafusion.parallel.degrees import check_degrees
from megafusion.storage import write_file
from megafusion.train.config import RunConfig
from megafusion.train.run_folder import changed_recipe


def launch(
    config_file: Path,
    overrides: Sequence[str],
    site_name: str,
    nodes: int,
    time: str | None = None,
    launcher: str | None = None,
    dry_run: bool = False,
) -> str:
    """Write a run's job script and its frozen configuration, and submit it; what to tell the user.

    dry_run: write and submit nothing, and return the script. UserError for whatever does not fit together, a
    world of ranks that the configuration cannot be laid over, or a run folder with another recipe, included.
    Where it raises, what the run's other jobs read is as it was.
    """
    site = Site.load(site_name)
    config = load_config(RunConfig, config_file, overrides)
    launcher = check_launcher(launcher or site.launcher, "--launcher")
    submission = f"{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}"
    job = Job(plain_path(config.out, "out"), site, nodes, launcher, time, submission)
    check_degrees(
        config.model,
        config.parallel,
        sequence_length=config.data.sequence_length,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        world_size=job.world_size,
    )
    changed_recipe(config)
    for missing in _not_here(config):
        print(f"warning: {missing} is not there, as seen from here: the job would end", file=sys.stderr)
    script = render(job)
    if dry_run:
        return script
    if not shutil.which("sbatch"):
        raise UserError(
            "sbatch is not on the PATH: launch from a login node, or look at the job with --dry-run"
        )
    config = config.model_copy(update={"out": job.run})
    (job.run / "logs").mkdir(parents=True, exist_ok=True)
    write_file(job.config, dump_config(config))
    write_file(job.script, script)
    before = _queued(job)
    job_id = _submit(job)
    # A job that ends looks here whether it has been replaced: by this one, if it is older.
    write_file(job.run / "launch" / "job", f"{job_id}\n")
    return _told(job, job_id, before)


def _not_here(config: RunConfig) -> Iterator[str]:
    """What a run reads and this machine does not see; a login node need not see all that the nodes do."""
    for name, source in config.data.sources.items():
        if "://" not in source.path and not (Path(source.path) / MANIFEST).is_file():
            yield f"data.sources.{name}.path {source.path}"
    if not config.data.tokenizer.is_file():
        yield f"data.tokenizer {config.data.tokenizer}"
    if not config.data.vae.is_dir():
        yield f"data.vae {config.data.vae}"


def _submit(job: Job) -> str:
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
        raise RuntimeError(f"sbatch answered {done.stdout!r}, which is no job's number")
    return job_id


def _queued(job: Job) -> list[str]:
    """Numbers of this run's jobs that are in the queue already."""
    done = subprocess.run(
        ["squeue", "--noheader", "--me", "--format=%A", f"--name={job.name}"],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.split()


def _told(job: Job, job_id: str, before: list[str]) -> str:
    lines = [
        f"job {job_id}: {job.world_size} ranks on {job.nodes} nodes, {job.run}",
        "follow it:",
        f"  squeue --job {job_id}",
        f"  tail -F {job.run}/logs/rank-00000.log    # job-{job_id}.log beside it has starts and ends",
        f"  megafusion status {job.run}",
        "save and go back into the queue, or end:",
        f"  scancel --signal=USR1 {job_id}",
        f"  scancel {job_id}",
    ]
    for older in before:
        lines.append(
            f"job {older} of this run is in the queue; {job_id} starts when it has ended, which it does, "
            f"with a checkpoint, after: scancel --signal=USR1 {older}"
        )
    return "\n".join(lines)
