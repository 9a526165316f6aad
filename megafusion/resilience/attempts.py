"""Attempts of a run: one for each time it is started. RUN/starts.json has how each ended, RUN/step its step.

An attempt without a recorded end was killed or its process died, in the step that RUN/step names. This file
also holds the one rule for crash loops. It loads no torch, so the rule applies before anything can crash.
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
from typing import Any

from megafusion.errors import ExitStatus, UserError, refuse_os_errors
from megafusion.storage import write_file

ATTEMPTS, STEP = "starts.json", "step"
START = "MEGAFUSION_START"
"""Variable of our launchers: LAUNCH:NUMBER, the launch's name and the number of this start in it, from 1."""
CRASHED = "crashed"
WAIT_SECONDS, WAIT_SECONDS_REMOTE = 20.0, 150.0
"""Longest wait for the attempt before to exit; on another machine, whose lock a file server may hold for a
while after the machine is lost."""


def refuse_crash_loop(folder: Path, newest_step: int, max_crashes: int) -> None:
    """Raise UserError (FAILED) if the last `max_crashes` attempts crashed without a new checkpoint.

    newest_step: of the newest checkpoint; 0 without one. max_crashes: 0 for no limit. Launchers number their
    starts (MEGAFUSION_START), so a start that died before it was recorded counts as well, and a new launch
    counts anew. Every rank calls this before the ranks connect and decides alike, because the record does not
    change until all have connected.
    """
    attempts = read_attempts(folder)
    launch, number = _launch(os.environ.get(START, ""))
    ours = [attempt for attempt in attempts if _launch(attempt.get("start", ""))[0] == launch]
    num_crashes = max(0, number - 1 - (_launch(ours[-1]["start"])[1] if launch and ours else 0))
    for attempt in reversed(attempts):
        if attempt not in ours or attempt["ended"] != CRASHED or attempt["resumed_at"] != newest_step:
            break
        num_crashes += 1
    if not max_crashes or num_crashes < max_crashes or is_running(folder):
        return
    cause = f" ({ours[-1]['error']})" if ours and "error" in ours[-1] else ""
    raise UserError(
        f"{folder}: crash loop: the last {num_crashes} attempts crashed without a checkpoint after step "
        f"{newest_step}{cause}; find the cause (RUN/logs/, RUN/stacks/), then launch the run again, or "
        "start it once with resilience.max_crashes=0",
        on_every_rank=True,
        exit_status=ExitStatus.FAILED,
    )


class Attempts:
    """Record of the attempts, written by rank 0: `claim` locks the run, `begin` adds one, `end` closes it."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._attempts: list[dict] = []
        self._step_file: int | None = None
        self._has_begun = False

    def claim(self) -> None:
        """Lock the run folder, which is made if needed, until `end` or the end of this process.

        UserError if another process keeps the lock (RETRY if it is on another machine, else FAILED).
        """
        with refuse_os_errors(f"{self._folder}: cannot be written", "; free space or choose another out="):
            self._folder.mkdir(parents=True, exist_ok=True)
            self._step_file = os.open(self._folder / STEP, os.O_WRONLY | os.O_CREAT, 0o644)
            if not lock(self._step_file):
                self._wait_for_lock(self._step_file)
        self._attempts = read_attempts(self._folder)
        for attempt in self._attempts:
            attempt.pop("is_open", None)  # this process is the run now

    def _wait_for_lock(self, step_file: int) -> None:
        latest = next(iter(read_attempts(self._folder)[::-1]), {})
        is_local = latest.get("host", socket.gethostname()) == socket.gethostname()
        # Between its lock and its record an attempt has no name yet.
        is_named = latest.get("is_open")
        holder = f"process {latest['pid']} on {latest['host']}" if is_named else "another process"
        seconds = WAIT_SECONDS if is_local else WAIT_SECONDS_REMOTE
        waits = f"waiting up to {seconds:.0f} s for it to exit"
        print(f"{self._folder}: locked by {holder}; {waits}", file=sys.stderr)
        if not lock(step_file, seconds):
            self._release()
            raise UserError(
                f"{self._folder}: {holder} trains in this folder; wait, stop it, or choose another out=",
                # One on another machine may be cut off and about to exit, so a retry can succeed.
                exit_status=ExitStatus.FAILED if is_local else ExitStatus.RETRY,
            )

    def begin(self, world_size: int, newest_step: int, changed: dict[str, list] | None = None) -> None:
        """Add an attempt. newest_step: of the checkpoint to load. changed: old and new values by key."""
        attempt = {"time": time.time(), "host": socket.gethostname(), "pid": os.getpid()}
        attempt |= {"start": os.environ.get(START, ""), "world_size": world_size, "changed": changed or {}}
        self._attempts.append(attempt | {"resumed_at": newest_step, "step": newest_step, "ended": None})
        self._has_begun = True
        self._record()
        self.at(newest_step)

    def resumed(self, step: int) -> None:
        """Record the step of the checkpoint that was loaded: an older one if the newest is damaged."""
        if self._has_begun and self._attempts[-1]["resumed_at"] != step:
            self._record(resumed_at=step, step=step)
            self.at(step)

    def at(self, step: int) -> None:
        """Record the current step, in a few microseconds: the page cache is overwritten in place."""
        if self._step_file is not None:
            with suppress(OSError):  # a full disk must not end a step
                os.pwrite(self._step_file, f"{step:>12}\n".encode(), 0)

    def end(self, ended: str, error: str | None = None) -> None:
        """Record how this attempt ended: "finished", "preempted", "stopped", "refused", "interrupted" or
        "crashed"."""
        if self._has_begun:
            more = {"error": error} if error else {}
            self._record(step=_step(self._folder), ended=ended, until=time.time(), **more)
        self._release()

    def _record(self, **values: Any) -> None:
        self._attempts[-1] |= values
        with suppress(OSError):  # the self-test names a disk that cannot be written
            write_file(self._folder / ATTEMPTS, json.dumps(self._attempts, indent=1))

    def _release(self) -> None:
        if self._step_file is not None:
            os.close(self._step_file)
            self._step_file = None


def read_attempts(folder: Path) -> list[dict]:
    """A run's attempts, oldest first; one without a recorded end has "crashed" (or is running: "is_open")."""
    try:
        attempts = json.loads((folder / ATTEMPTS).read_text())
    except (OSError, ValueError):
        return []
    for number, attempt in enumerate(attempts):
        if attempt["ended"] is None:
            attempt["ended"] = CRASHED
            if number == len(attempts) - 1:
                attempt |= {"step": _step(folder), "is_open": True}
    return attempts


def _launch(start: str) -> tuple[str, int]:
    """Name of the launch and number of the start; "" and 0 without one of our launchers."""
    launch, _, number = start.rpartition(":")
    return launch, int(number or 0)


def is_running(folder: Path) -> bool:
    """Whether a process trains in a run folder, by its lock."""
    try:
        with (folder / STEP).open() as file:
            return not lock(file.fileno(), kind=fcntl.LOCK_SH)
    except OSError:
        return False


def lock(file: int, seconds: float = 0, kind: int = fcntl.LOCK_EX) -> bool:
    """Acquire a lock within a time; True as well on a disk without locks, with a warning."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.2)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            print("warning: this disk has no file locks: start a run only once", file=sys.stderr)
            return True


def _step(folder: Path) -> int:
    try:
        return int((folder / STEP).read_text())
    except (OSError, ValueError):
        return 0
