"""`megafusion status`."""

from pathlib import Path
from typing import Annotated

import typer


def status(
    run_folder: Annotated[Path, typer.Argument(help="Folder of a run, training or ended.", metavar="RUN")],
) -> None:
    """Show a run on one screen: progress, losses, speed, latest checkpoint, what was skipped, restarts.

    Example: megafusion status runs/quickstart
    """
    from megafusion.telemetry.status import show_status

    show_status(run_folder)
