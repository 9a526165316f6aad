"""The progress bar of every command."""

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class _Progress(Progress):
    def stop(self) -> None:
        """Stop as rich does, but without its empty line where nothing was started."""
        if self.live.is_started:
            super().stop()


def progress_bar(disable: bool = False) -> Progress:
    """A rich progress bar on stderr: description, count, time left, and the task's `losses` text."""
    return _Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[losses]}"),
        console=Console(stderr=True),
        disable=disable,
    )
