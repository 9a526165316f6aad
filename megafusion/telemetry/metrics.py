"""Output of a run while it trains: progress bar, RUN/metrics.jsonl, trackers."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from PIL import Image

from megafusion.errors import UserError
from megafusion.progress import progress_bar
from megafusion.telemetry.config import TelemetryConfig
from megafusion.telemetry.metrics_file import METRICS, truncate_metrics
from megafusion.telemetry.trackers import Tracker, open_trackers


class Metrics:
    """Context manager that opens every output on rank 0 and does nothing on the other ranks.

    num_steps: of the whole run. first_step: steps that are done. stops_on_write_error: whether a failed write
    ends the run. Raises UserError if the run folder cannot be written.
    """

    def __init__(
        self,
        config: TelemetryConfig,
        folder: Path,
        num_steps: int,
        first_step: int,
        stops_on_write_error: bool,
        silent: bool,
    ):
        self._config, self._folder, self._silent = config, folder, silent
        self._stops_on_write_error = stops_on_write_error
        self.progress = progress_bar(disable=silent)
        self._task = self.progress.add_task("training", total=num_steps, completed=first_step, losses="")
        self._trackers: list[Tracker] = []
        if not silent:
            try:
                truncate_metrics(folder, first_step)
                self._open(first_step)
            except OSError as error:
                raise UserError(f"{folder}: cannot be written ({error.strerror or error})") from error

    def _open(self, step: int) -> None:
        self._lines = (self._folder / METRICS).open("a")
        self._trackers = open_trackers(self._config, self._folder, step)

    def _close(self) -> None:
        with self.handle_write_errors():
            self._lines.close()
        for tracker in self._trackers:
            with self.handle_write_errors():
                tracker.close()

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

    def __enter__(self) -> "Metrics":
        self.progress.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.progress.stop()
        if not self._silent:
            self._close()

    def say(self, text: str) -> None:
        """Print a line above the progress bar."""
        if not self._silent:
            self.progress.console.print(text, markup=False)

    def advance(self, step: int) -> None:
        """Move the progress bar."""
        self.progress.update(self._task, completed=step)

    def rewind(self, step: int) -> None:
        """Remove the records of the steps that a rollback has undone."""
        self.advance(step)
        self.say(f"{self._folder}: rolled back to step {step}; the data since then is skipped")
        if not self._silent:
            self._close()
            with self.handle_write_errors():
                truncate_metrics(self._folder, step)
            with self.handle_write_errors():
                self._open(step)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record figures after `step` updates."""
        if self._silent:
            return
        with self.handle_write_errors():
            self._lines.write(json.dumps({"step": step, **values}) + "\n")
            self._lines.flush()  # on a full disk the rest stays in the buffer until the next flush
        for tracker in self._trackers:
            with self.handle_write_errors():
                tracker.log(step, values)
        shown = (
            f"text {values['text_loss']:.3f}  image {values['image_loss']:.4f}  "
            f"{values['tokens_per_second']:,.0f} tokens/s"
        )
        self.progress.update(self._task, losses=shown)
        if not self.progress.console.is_terminal:  # a log file shows no bar
            self.say(f"step {step}  {shown}")

    def log_samples(self, step: int, sheet: Image.Image, captions: str) -> None:
        """Record a sheet of sample images and the generated captions."""
        for tracker in self._trackers:
            tracker.log_samples(step, sheet, captions)
