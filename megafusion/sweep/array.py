"""A sweep as two arrays of SLURM: one of trainings, and one of evaluations, each after its training."""

import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

from megafusion.errors import UserError
from megafusion.launch.job import (
    ROOT,
    TEMPLATE,
    Job,
    fill,
    job_options,
    job_values,
    make_job,
    queued_jobs,
    refuse_without_sbatch,
    replace_job,
    sbatch,
)
from megafusion.storage import write_file
from megafusion.sweep.local import command, freeze
from megafusion.sweep.members import Member

EVALUATE = ROOT / "launchers" / "slurm" / "evaluate.sbatch"
SINGLETON = "#SBATCH --dependency=singleton\n"
"""A job's rule that would run the tasks of an array one after another; their runs have locks."""


class Arrays:
    """Scripts of the members that are not done: task n is the member n of the sweep."""

    def __init__(self, members: Sequence[Member], job: Job, at_once: int | None):
        """at_once: tasks that may run at the same time; all by default."""
        self.job = job
        """Of the sweep's folder: site, size, and the submission's folder."""
        self.tasks = {number: member for number, member in enumerate(members) if not member.is_done}
        self.array = ",".join(map(str, self.tasks)) + (f"%{at_once}" if at_once else "")
        self.folder = job.run / "sweep.launch" / job.submission

    def train(self) -> str:
        """Script of the trainings."""
        options = job_options(self.job) | self._options("train")
        script = fill(TEMPLATE, options, job_values(self.job), self._commands("train"))
        assert SINGLETON in script, f"{TEMPLATE}: the line {SINGLETON!r} is gone"
        return script.replace(SINGLETON, "")

    def evaluate(self) -> str:
        """Script of the evaluations, each one process; empty if the sweep measures nothing."""
        if not any(member.suites for member in self.tasks.values()):
            return ""
        one = {"nodes": "1", "ntasks-per-node": "1"}
        options = job_options(self.job) | one | self._options("evaluate")
        return fill(EVALUATE, options, job_values(self.job), self._commands("evaluate"))

    def submit(self) -> str:
        """Freeze the configurations and submit both; returns how to follow them. Raises UserError."""
        refuse_without_sbatch()
        if queued := queued_jobs(self.job.name):
            raise UserError(
                f"{self.job.run}: array {queued[0]} of this sweep is queued or running; wait for it, or "
                f"end it: scancel {queued[0]}"
            )
        for member in self.tasks.values():
            freeze(member, self.folder)
        trainings, evaluations = self._write("train", self.train()), self.evaluate()
        try:
            job_id = sbatch(trainings)
        except UserError:
            shutil.rmtree(self.folder)
            raise
        for number, member in self.tasks.items():
            replace_job(member.out.absolute(), f"{job_id}_{number}")
        lines = [f"array {job_id}: {len(self.tasks)} runs, {self.folder}"]
        if evaluations:
            script = self._write("evaluate", evaluations)
            try:
                after = sbatch(script, f"--dependency=aftercorr:{job_id}")
            except (UserError, RuntimeError) as error:
                raise UserError(
                    f"{error}; the trainings are queued as array {job_id}: when they have ended, the same "
                    "command submits the evaluations"
                ) from error
            lines.append(f"array {after}: their evaluations, each after its training")
        return "\n".join([*lines, f"follow them: squeue --job {job_id}; the same command with --report"])

    def _options(self, stage: str) -> dict[str, str]:
        return {"array": self.array, "job-name": self.job.name, "output": f"{self.folder}/{stage}-%a.log"}

    def _commands(self, stage: str) -> list[str]:
        """Shell that sets the arguments of a task."""
        lines = []
        for number, member in self.tasks.items():
            config = self.folder / member.name / "config.yaml"
            words = [str(config)] if stage == "train" else command(member, stage, config)
            run = shlex.quote(str(member.out.absolute()))
            lines.append(f"  {number}) export MEGAFUSION_RUN={run}; set -- {shlex.join(words)} ;;")
        return ["case $SLURM_ARRAY_TASK_ID in", *lines, "esac"]

    def _write(self, stage: str, script: str) -> Path:
        path = self.folder / f"sweep.{stage}.sbatch"
        write_file(path, script)
        return path


def make_arrays(
    members: Sequence[Member],
    out: Path,
    site: str,
    nodes: int,
    launcher: str | None,
    time: str | None,
    at_once: int | None,
) -> Arrays:
    """The arrays of a sweep, as `megafusion launch` makes a job. Raises UserError for an option."""
    job = make_job(out, site, nodes, launcher, time)
    for member in members:
        member.check_world_size(job.world_size)
    return Arrays(members, job, at_once)
