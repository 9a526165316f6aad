"""`megafusion sweep`."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from megafusion.commands.arguments import Overrides
from megafusion.errors import ExitStatus, UserError


def sweep(
    config: Annotated[Path, typer.Argument(help="YAML file of the sweep.", metavar="SWEEP")],
    overrides: Overrides = None,
    jobs: Annotated[
        int | None, typer.Option(help="Runs at a time: 1 by default here, all in SLURM.", min=1)
    ] = None,
    report: Annotated[
        bool, typer.Option("--report", help="Start nothing: gather the results that are there.")
    ] = False,
    fit: Annotated[
        list[str] | None,
        typer.Option(help="With --report: fit a metric against compute, and plot it; repeat for several."),
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(help="With --fit: arm whose compute is the measure; default: the first.")
    ] = None,
    site: Annotated[
        str | None, typer.Option(help="Run as an array of SLURM on this cluster, as `launch` does.")
    ] = None,
    nodes: Annotated[int, typer.Option(help="With --site: nodes of a run.", min=1)] = 1,
    time_limit: Annotated[
        str | None, typer.Option("--time", help="With --site: time limit in sbatch's form.")
    ] = None,
    launcher: Annotated[str | None, typer.Option(help="With --site: srun or deepspeed.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print what would be done, start nothing.")
    ] = False,
) -> None:
    """Train and evaluate many runs over one configuration: sweep.json and sweep.md.

    A run that is finished is skipped, one that was interrupted resumes, and one that fails does not stop the
    others: the exit status is then 1. The results are written whenever a run has ended; runs of other values
    of the grid, of earlier calls, stay among them.

    Example: megafusion sweep sweep.yaml --jobs 2
    """
    from megafusion.sweep.config import load_sweep
    from megafusion.sweep.members import earlier_members, expand, left_nothing
    from megafusion.sweep.results import recorded_runs, write_results

    if fit and not report:
        raise UserError("--fit reads the results that are there: add --report")
    if baseline and not fit:
        raise UserError("--baseline is the measure of a fit, and none is asked for: add --fit")
    if not site and (nodes != 1 or time_limit or launcher):
        raise UserError("--nodes, --time and --launcher are for a cluster's array: add --site")
    values = load_sweep(config, overrides or [])
    members = expand(values, str(config))
    recorded = recorded_runs(values.out)
    others = (
        earlier_members(values, str(config), recorded, members),
        left_nothing(values, recorded, members),
    )
    if site:
        from megafusion.sweep.array import make_arrays

        arrays = make_arrays(members, values.out, site, nodes, launcher, time_limit, jobs)
        for member in members:
            for missing in member.missing:
                print(f"warning: {member.name}: {missing} not found on this machine", file=sys.stderr)
        if not arrays.tasks and (dry_run or not report):
            typer.echo(f"{values.out}: every run is done")
            return
        if dry_run:
            typer.echo("\n".join(filter(None, (arrays.train(), arrays.evaluate()))))
            return
        if not report:
            typer.echo(arrays.submit())
            write_results(values.out, members, {}, *others)  # so that later calls know of these runs
            return
    if dry_run:
        for member in members:
            what = ", ".join([f"{member.num_steps} steps", *member.suites])
            typer.echo(f"{member.out}: {what}{': done' if member.is_done else ''}")
        return
    errors: dict[str, str] = {}
    if not report:
        from megafusion.sweep.local import run_members

        for member in members:
            member.check_world_size(1)
            if member.missing:
                raise UserError(f"{config}: {member.name}: {', '.join(member.missing)} not found")
        errors = run_members(
            members,
            values.out / "sweep.launch/local",
            jobs or 1,
            lambda failed: write_results(values.out, members, failed, *others),
        )

    def add_fits(results: dict[str, Any]) -> str:
        from megafusion.sweep.plot import describe, fit_metric

        results["fits"] = {name: fit_metric(results, name, baseline, values.out) for name in fit or ()}
        return describe(results["fits"])

    write_results(values.out, members, errors, *others, add_fits if fit else None)
    typer.echo((values.out / "sweep.md").read_text(), nl=False)
    if errors:
        raise typer.Exit(ExitStatus.FAILED)
