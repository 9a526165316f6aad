"""Error reporting that the builders' command lines share."""

import sys
from collections.abc import Callable

import typer

from megafusion.errors import UserError
from megafusion.resilience.exit_status import ExitStatus


def run_command(command: Callable[[], None]) -> None:
    """Run a command line; print a UserError without a traceback and exit with status 2."""
    try:
        command()
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(ExitStatus.REFUSED)
