"""What every builder's command line does the same way: report errors."""

import sys

import typer

from megafusion.errors import UserError
from megafusion.resilience.exit_status import ExitStatus


def run_command(app: typer.Typer) -> None:
    """Run a command; what the user can fix is printed without a traceback, exit status 2."""
    try:
        app()
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(ExitStatus.REFUSED)
