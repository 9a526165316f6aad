"""What a run tells while it goes: a progress bar, RUN/metrics.jsonl, and the trackers."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from PIL import Image

from megafusion.errors import UserError
from megafusion.progress import progress_bar
from megafusion.storage import write_file
from megafusion.telemetry.metrics_file import METRICS, read_metrics
from megafusion.telemetry.trackers import Tracker, open_trackers
from megafusion.train.config import RunConfig

__all__ = ["METRICS", "Metrics", "read_metrics"]


class Metrics:
    """A context that has opened every sink on rank 0, and is silent on the others.

    Raises UserError where the run folder cannot be written.
    """

    def __init__(self, config: RunConfig, first_step: int, silent: bool):
        self._silent, self._config = silent, config
        self._folder = config.out
        self._first_step, self._num_steps = first_step, config.train.num_steps
        self.progress = progress_bar(disable=silent)
        self._task = self.progress.add_task(
            "training", total=self._num_steps, completed=first_step, losses=""
        )
        self._trackers: list[Tracker] = []
        if not silent:
            try:
                _forget_after(self._folder, first_step)
                self._open(first_step)
            except OSError as error:
                raise UserError(f"{self._folder}: cannot be written ({error.strerror or error})") from error

    def _open(self, step: int) -> None:
        self._lines = (self._folder / METRICS).open("a")
        self._trackers = open_trackers(self._config, step)

    def _close(self) -> None:
        with self.as_the_disk_allows():
            self._lines.close()
        for tracker in self._trackers:
            with self.as_the_disk_allows():
                tracker.close()

    @contextmanager
    def as_the_disk_allows(self, what: str = "metrics") -> Iterator[None]:
        """Where training goes on without a checkpoint, it does so without this; else UserError."""
        try:
            yield
        except OSError as error:
            reason = error.strerror or error
            if self._config.checkpoint.on_save_error == "stop":
                raise UserError(
                    f"{self._folder}: cannot write {what} ({reason}); free space and start again"
                ) from error
            self.say(f"warning: {what} not written ({reason})")

    def __enter__(self) -> "Metrics":
        self.progress.start()
        if self._first_step:
            state = "is finished" if self._first_step >= self._num_steps else "goes on"
            self.say(f"{self._folder}: {state} after step {self._first_step}")
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.progress.stop()
        if not self._silent:
            self._close()

    def say(self, text: str) -> None:
        """Print a line beside the progress bar."""
        if not self._silent:
            self.progress.console.print(text, markup=False)

    def advance(self, step: int) -> None:
        """Move the progress bar."""
        self.progress.update(self._task, completed=step)

    def rewind(self, step: int) -> None:
        """The run has gone back to a step: what was recorded of those after it is dropped."""
        self.advance(step)
        self.say(f"{self._folder}: goes back to step {step}, past the data since then")
        if not self._silent:
            self._close()
            with self.as_the_disk_allows():
                _forget_after(self._folder, step)
            with self.as_the_disk_allows():
                self._open(step)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record numbers as they are after `step` updates."""
        if self._silent:
            return
        with self.as_the_disk_allows():
            self._lines.write(json.dumps({"step": step, **values}) + "\n")
            self._lines.flush()  # what a full disk does not take stays in the buffer, for the next time
        for tracker in self._trackers:
            with self.as_the_disk_allows():
                tracker.log(step, values)
        shown = (
            f"text {values['text_loss']:.3f}  image {values['image_loss']:.4f}  "
            f"{values['tokens_per_second']:,.0f} tokens/s"
        )
        self.progress.update(self._task, losses=shown)
        if not self.progress.console.is_terminal:  # a log file shows no bar
            self.say(f"step {step}  {shown}")

    def show(self, step: int, sheet: Image.Image, captions: str) -> None:
        """Record a sheet of sample pictures and the captions written."""
        for tracker in self._trackers:
            tracker.show(step, sheet, captions)


def _forget_after(folder: Path, step: int) -> None:
    """Drop lines of steps that are about to be run again after a resume."""
    if (folder / METRICS).is_file():
        kept = [line for line in read_metrics(folder) if line["step"] <= step]
        write_file(folder / METRICS, "".join(json.dumps(line) + "\n" for line in kept))
