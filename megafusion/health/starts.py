"""A run's starts and how each ended: `starts.json` in the run folder, and the step it is at in `step`.

A start that says nothing of its end was killed, or its process died; it ended at the step that `step` names.
"""

import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path

from megafusion.errors import UserError
from megafusion.storage import write_file

STARTS, STEP = "starts.json", "step"
CRASHED = "crashed"


class Starts:
    """The record, kept by rank 0 alone. `begin` adds a start, `end` says how it ended."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._starts = read_starts(folder)
        for start in self._starts:
            start.pop("is_open", None)  # this process is the run now
        self._step_file: int | None = None

    def refuse_crash_loop(self, most: int) -> None:
        """UserError (status 1) where the latest `most` starts (0: any number) crashed at one step."""
        steps = [start["step"] if start["ended"] == CRASHED else None for start in self._starts]
        crashes = 0
        while crashes < len(steps) and steps[-1 - crashes] is not None and steps[-1 - crashes] == steps[-1]:
            crashes += 1
        if not most or crashes < most:
            return
        said = self._starts[-1].get("error")
        error = UserError(
            f"{self._folder}: not started again, for its last {crashes} starts crashed at step {steps[-1]}"
            f"{f' ({said})' if said else ''}; find the cause (RUN/stacks/, the log), then start once with "
            "health.max_crashes=0"
        )
        error.exit_status = 1
        raise error

    def begin(self, step: int, world_size: int) -> None:
        """Add a start that goes on after `step`. UserError where the folder cannot be written."""
        self._starts.append(
            {
                "time": time.time(),
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "world_size": world_size,
                "resumed_at": step,
                "step": step,
                "ended": None,
            }
        )
        try:
            write_file(self._folder / STARTS, json.dumps(self._starts, indent=1))
            self._step_file = os.open(self._folder / STEP, os.O_WRONLY | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(f"{self._folder}: cannot be written ({error.strerror or error})") from error
        self.at(step)

    def at(self, step: int) -> None:
        """The step that the run is in: a few microseconds, for it is written over in memory of the system."""
        if self._step_file is not None:
            with suppress(OSError):  # a disk that refuses must not end a step
                os.pwrite(self._step_file, f"{step:>12}\n".encode(), 0)

    def end(self, ended: str, error: str | None = None) -> None:
        """How this start ended: "finished", "preempted", "stopped", "refused", "interrupted" or "crashed"."""
        if self._step_file is None:
            return
        os.close(self._step_file)
        self._step_file = None
        self._starts[-1] |= {"step": _step(self._folder), "ended": ended, "until": time.time()}
        if error:
            self._starts[-1]["error"] = error
        with suppress(OSError):
            write_file(self._folder / STARTS, json.dumps(self._starts, indent=1))


def read_starts(folder: Path) -> list[dict]:
    """A run's starts, oldest first; one that did not say how it ended has "crashed" (or still runs)."""
    try:
        starts = json.loads((folder / STARTS).read_text())
    except (OSError, ValueError):
        return []
    for number, start in enumerate(starts):
        if start["ended"] is None:
            start["ended"] = CRASHED
            if number == len(starts) - 1:
                start |= {"step": _step(folder), "is_open": True}
    return starts


def _step(folder: Path) -> int:
    try:
        return int((folder / STEP).read_text())
    except (OSError, ValueError):
        return 0
