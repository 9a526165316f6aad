"""`megafusion launch`."""

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from megafusion.commands.arguments import ConfigFile, Overrides
from megafusion.config import dump_config

if TYPE_CHECKING:
    from megafusion.train.config import RunConfig


def launch(
    config: ConfigFile,
    site: Annotated[
        str, typer.Option(help="Cluster: a name in launchers/sites/, or the path of such a file.")
    ],
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(help="Nodes of the job.", min=1)] = 1,
    time_limit: Annotated[
        str | None, typer.Option("--time", help="Time limit in sbatch's form; default: the site's.")
    ] = None,
    launcher: Annotated[
        str | None, typer.Option(help="Starts the ranks: srun or deepspeed; default: the site's.")
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(help="GPU of a rank, for a plan of the job; default: the site's MEGAFUSION_GPU."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the job script, submit nothing.")
    ] = False,
) -> None:
    """Submit a run to SLURM: its job script and frozen configuration go into the run folder.

    The job requeues itself until the run is finished. Submitting a run again, with other --nodes, resumes it
    in the new job once the old one has ended.

    Example: megafusion launch configs/7b.yaml parallel.tensor=8 --site example --nodes 16 --dry-run
    """
    from megafusion.launch.job import make_job, render, submit
    from megafusion.train.from_data import load_training_config
    from megafusion.train.inputs import missing_inputs
    from megafusion.train.run_folder import changed_recipe

    values = load_training_config(config, overrides or [])
    job = make_job(values.out, site, nodes, launcher, time_limit)
    values.check_degrees(job.world_size)
    changed_recipe(values)
    for warning in values.warnings():
        print(warning, file=sys.stderr)
    for missing in missing_inputs(values):
        print(f"warning: {missing} not found on this machine: the job would fail", file=sys.stderr)
    for line in _planned(values, job.world_size, gpu or job.site.environment.get("MEGAFUSION_GPU")):
        print(line, file=sys.stderr)
    script = render(job)
    if dry_run:
        typer.echo(script)
    else:
        frozen = dump_config(values.model_copy(update={"out": job.run}))
        typer.echo(submit(job, script, frozen))


def _planned(values: "RunConfig", world_size: int, gpu: str | None) -> Iterator[str]:
    """The plan of the job, in words; nothing without the name of a GPU."""
    if gpu is None:
        return
    from megafusion.plan.chip import load_chip
    from megafusion.plan.fit import does_not_fit
    from megafusion.plan.report import one_line
    from megafusion.plan.search import plan_job

    chip, job = load_chip(gpu), values.job(world_size)
    yield f"plan: {one_line(plan_job(job, chip))}"
    for sentence in does_not_fit(job, chip.memory_bytes, f"a GPU ({chip.name})"):
        yield f"warning: {sentence}"
