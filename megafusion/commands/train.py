"""`megafusion train`."""

import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from megafusion.commands.arguments import ConfigFile, Overrides
from megafusion.errors import ExitStatus, UserError
from megafusion.processes import world_size
from megafusion.resilience.signals import StopSignals

stop_signals = StopSignals()


def listen_for_signals() -> None:
    """Handle stop signals from now on: to be called before torch is imported, which takes seconds."""
    stop_signals.listen()
    if (stopped := os.environ.get("MEGAFUSION_STOPPED")) and Path(stopped).is_file():
        sys.exit(ExitStatus.RETRY)  # local.sh or node.sh was signalled before this process listened


def train(
    config: ConfigFile,
    overrides: Overrides = None,
    stop_after: Annotated[
        int | None,
        typer.Option(help="Stop after this step of the run, with a checkpoint; resume later.", min=1),
    ] = None,
) -> None:
    """Train a model. Re-running the same command resumes from the latest checkpoint; the result is bitwise
    identical to an uninterrupted run.

    Ctrl-C, SIGTERM, SIGUSR1 or SIGHUP to any process stops all of them after the current step, with a
    checkpoint and exit status 75. A hang or a lost process stops them too, without a new checkpoint.

    Example: megafusion train configs/quickstart.yaml train.num_steps=50 out=runs/try

    On 8 GPUs: deepspeed --num_gpus 8 --no_local_rank --module megafusion.cli train CONFIG parallel.tensor=4
    """
    from megafusion.checkpoint.folder import newest_step
    from megafusion.resilience.attempts import refuse_crash_loop
    from megafusion.train.from_data import load_training_config

    is_alone = world_size() == 1
    try:
        values = load_training_config(config, overrides or [])
    except UserError as error:
        if is_alone:
            raise
        raise_with_the_other_ranks(error)
    # Before torch is imported, because a process that dies during the import is a crashed attempt too.
    refuse_crash_loop(values.out, newest_step(values.out), values.resilience.max_crashes)
    from megafusion.train.loop import train as run

    if run(values, stop_after, stop_signals) == "preempted":
        raise typer.Exit(ExitStatus.RETRY)


def raise_with_the_other_ranks(error: UserError) -> NoReturn:
    """Raise a rank's error so that every rank ends with it, those with a valid configuration included."""
    from megafusion.engine.process_group import start_process_group
    from megafusion.parallel.errors import raise_on_all_ranks

    start_process_group()
    with raise_on_all_ranks():  # as the other ranks' first collective
        raise error
