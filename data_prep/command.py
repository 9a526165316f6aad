"""Error reporting that the builders' command lines share."""

import sys

import typer

from megafusion.errors import UserError
from megafusion.resilience.exit_status import ExitStatus


def run_command(app: typer.Typer) -> None:
    """Run a command; print a UserError without a traceback and exit with status 2."""
    try:
        app()
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(ExitStatus.REFUSED)
