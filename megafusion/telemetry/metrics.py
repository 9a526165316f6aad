"""Output of a run while it trains: progress bar, RUN/metrics.jsonl, trackers."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from megafusion.errors import UserError, refuse_os_errors
from megafusion.progress import progress_bar
from megafusion.telemetry.config import TelemetryConfig
from megafusion.telemetry.metrics_file import truncate_metrics
from megafusion.telemetry.trackers import Tracker, open_trackers


class Metrics:
    """Every output, on rank 0; nothing on the other ranks, which are silent.

    num_steps: of the whole run. stops_on_write_error: whether a failed write ends the run.
    """

    def __init__(
        self, config: TelemetryConfig, folder: Path, num_steps: int, stops_on_write_error: bool, silent: bool
    ):
        self._config, self._folder = config, folder
        self._stops_on_write_error, self._silent = stops_on_write_error, silent
        self._progress = progress_bar(disable=silent)
        self._task = self._progress.add_task("training", total=num_steps, losses="")
        self._trackers: list[Tracker] = []

    @contextmanager
    def open(self, first_step: int) -> Iterator[None]:
        """Open the outputs of a run after `first_step` steps. UserError if they cannot be written."""
        if not self._silent:
            with refuse_os_errors(f"{self._folder}: cannot be written"):
                truncate_metrics(self._folder, first_step)
                self._trackers = open_trackers(self._config, self._folder, first_step)
        try:
            with self._progress:
                self.advance(first_step)
                yield
        finally:
            self._close()

    def _close(self) -> None:
        for tracker in self._trackers:
            with self.handle_write_errors():
                tracker.close()
        self._trackers = []

    @contextmanager
    def handle_write_errors(self, what: str = "metrics") -> Iterator[None]:
        """Turn an OSError into a UserError or a warning, as for a checkpoint that cannot be written."""
        try:
            yield
        except OSError as error:
            reason = error.strerror or error
            if self._stops_on_write_error:
                raise UserError(
                    f"{self._folder}: cannot write {what} ({reason}); free space and start again"
                ) from error
            self.say(f"warning: {what} not written ({reason})")

    def say(self, text: str) -> None:
        """Print a line above the progress bar."""
        if not self._silent:
            self._progress.console.print(text, markup=False, soft_wrap=True)

    def advance(self, step: int) -> None:
        """Move the progress bar."""
        self._progress.update(self._task, completed=step)

    def rewind(self, step: int) -> None:
        """Remove the records of the steps that a rollback has undone."""
        self.advance(step)
        self.say(f"{self._folder}: rolled back to step {step}; the data since then is skipped")
        self._close()
        if not self._silent:
            with self.handle_write_errors():
                truncate_metrics(self._folder, step)
            with self.handle_write_errors():
                self._trackers = open_trackers(self._config, self._folder, step)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record figures after `step` updates."""
        for tracker in self._trackers:
            with self.handle_write_errors():
                tracker.log(step, values)
        shown = (
            f"text {values['text_loss']:.3f}  image {values['image_loss']:.4f}  "
            f"{values['tokens_per_second']:,.0f} tokens/s"
        )
        self._progress.update(self._task, losses=shown)
        if not self._progress.console.is_terminal:  # a log file shows no bar
            self.say(f"step {step}  {shown}")

    def log_samples(self, step: int, sheet: Image.Image, captions: str) -> None:
        """Record a sheet of sample images and the generated captions."""
        for tracker in self._trackers:
            tracker.log_samples(step, sheet, captions)
