"""What every builder's command line does the same way: report errors, write files."""

import sys
import tempfile
from pathlib import Path

import typer

from megafusion.errors import UserError


def run_command(app: typer.Typer) -> None:
    """Run a command; what the user can fix is printed without a traceback, exit status 2."""
    try:
        app()
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a whole file or nothing: a reader never sees a part of it. Makes the folder if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        temporary = Path(file.name)
        try:
            file.write(content)
            file.close()
            # Temporary files are private by default; what we publish is readable by all.
            temporary.chmod(0o644)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
