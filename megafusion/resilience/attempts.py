"""A run's starts and how each ended: `starts.json` in the run folder, and the step it is at in `step`.

A start that says nothing of its end was killed, or its process died; it ended at the step that `step` names.
"""

import errno
import fcntl
import json
import os
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path

from megafusion.errors import UserError
from megafusion.storage import write_file

STARTS, STEP = "starts.json", "step"
CRASHED = "crashed"
ENDING_SECONDS, LOST_SECONDS = 20.0, 150.0
"""How long a start waits for the one before: that is ending; whose machine is lost, so that a file server
holds its lock for a while."""


class Attempts:
    """The record, kept by rank 0 alone: `claim` the run, `begin` adds a start, `end` says how it ended."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._starts: list[dict] = []
        self._step_file: int | None = None
        self._has_begun = False

    def claim(self) -> None:
        """Hold the run folder until `end`, or this process's: two at once would write over each other.

        UserError where another start holds it and does not end (status 1; 75 if it is on another machine), or
        the folder cannot be written.
        """
        try:
            self._step_file = os.open(self._folder / STEP, os.O_WRONLY | os.O_CREAT, 0o644)
            is_free = _lock(self._step_file)
            if not is_free:
                latest = next(iter(read_starts(self._folder)[::-1]), {})
                here = latest.get("host", socket.gethostname()) == socket.gethostname()
                # Between its lock and its record a start has no name yet.
                known = f"process {latest['pid']} on {latest['host']}" if latest.get("is_open") else None
                holder, patience = known or "another process", ENDING_SECONDS if here else LOST_SECONDS
                print(
                    f"{self._folder}: held by {holder}; waiting up to {patience:.0f} s for its end",
                    file=sys.stderr,
                    flush=True,
                )
                is_free = _lock(self._step_file, patience)
        except OSError as error:
            raise UserError(f"{self._folder}: cannot be written ({error.strerror or error})") from error
        if not is_free:
            self._release()
            error = UserError(
                f"{self._folder}: {holder} trains in this folder; let it end, end it, or choose another out="
            )
            # On another machine it may be one that is cut off, which will end: then the same command goes on.
            error.exit_status = 1 if here else os.EX_TEMPFAIL
            raise error
        self._starts = read_starts(self._folder)
        for start in self._starts:
            start.pop("is_open", None)  # this process is the run now

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

    def begin(self, world_size: int, changed: dict[str, list] | None = None) -> None:
        """Add a start. changed: by key, the value that the run began with and that of this start.

        UserError where the folder cannot be written.
        """
        start = {"time": time.time(), "host": socket.gethostname(), "pid": os.getpid()}
        step = _step(self._folder)  # of the start before, until a checkpoint is in place
        start |= {"world_size": world_size, "changed": changed or {}, "resumed_at": step, "step": step}
        self._starts.append(start | {"ended": None})
        try:
            self._write()
        except OSError as error:
            raise UserError(f"{self._folder}: cannot be written ({error.strerror or error})") from error
        self._has_begun = True

    def resumed(self, step: int) -> None:
        """The start goes on after this step, and is in it."""
        if self._has_begun:
            self._starts[-1] |= {"resumed_at": step, "step": step}
            with suppress(OSError):
                self._write()
            self.at(step)

    def at(self, step: int) -> None:
        """The step that the run is in: a few microseconds, for it is written over in memory of the system."""
        if self._step_file is not None:
            with suppress(OSError):  # a disk that refuses must not end a step
                os.pwrite(self._step_file, f"{step:>12}\n".encode(), 0)

    def end(self, ended: str, error: str | None = None) -> None:
        """How this start ended: "finished", "preempted", "stopped", "refused", "interrupted" or "crashed"."""
        if self._has_begun:
            self._starts[-1] |= {"step": _step(self._folder), "ended": ended, "until": time.time()}
            if error:
                self._starts[-1]["error"] = error
            with suppress(OSError):
                self._write()
        self._release()

    def _write(self) -> None:
        write_file(self._folder / STARTS, json.dumps(self._starts, indent=1))

    def _release(self) -> None:
        if self._step_file is not None:
            os.close(self._step_file)
            self._step_file = None


def _lock(file: int, seconds: float = 0) -> bool:
    """Whether an exclusive lock was had in time; a disk that keeps none refuses nobody and says so."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.2)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            print("warning: no locks on this disk: start a run once only", file=sys.stderr, flush=True)
            return True


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
