"""Errors that the user can fix, and the exit statuses of every command."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

from safetensors import SafetensorError


class ExitStatus(IntEnum):
    """The launchers restart a run after RETRY or a signal alone; launchers/common.sh has the same numbers."""

    OK = 0
    """Finished, or stopped by --stop-after."""
    FAILED = 1
    """An error that the same command meets again although its configuration is valid."""
    REFUSED = 2
    """Bad input: a configuration, data, a disk. The message names the way out."""
    RETRY = os.EX_TEMPFAIL
    """75: preempted, after a checkpoint if training had begun, or a rank was lost. The same command
    resumes."""


class UserError(ValueError):
    """Bad input from outside (a file, a key, a value).

    The message names the fault and the way out. The command line prints it without a traceback; any other
    exception that escapes is a bug and keeps its traceback. on_every_rank: every rank of a run raises this
    error with the same message, which rank 0 prints.
    """

    def __init__(
        self, message: str, *, on_every_rank: bool = False, exit_status: ExitStatus = ExitStatus.REFUSED
    ):
        super().__init__(message)
        self.on_every_rank, self.exit_status = on_every_rank, exit_status

    def __reduce__(self) -> tuple:
        """For another process: the message, not the arguments that a subclass makes it of."""
        return _rebuild, (type(self), str(self)), self.__dict__


def _rebuild(kind: type[UserError], message: str) -> UserError:
    return kind.__new__(kind, message)


@contextmanager
def refuse_os_errors(fault: str, way_out: str = "") -> Iterator[None]:
    """Raise an OSError of the block as a UserError. fault: a file or folder, and that it cannot be ...

    So is what safetensors raises in its place.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"{fault} ({getattr(error, 'strerror', None) or error}){way_out}") from error


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """End the process with the message and the exit status of a UserError of the block."""
    try:
        yield
    except UserError as error:
        if error.on_every_rank and int(os.environ.get("RANK") or 0):
            time.sleep(10)  # a launcher kills rank 0, which has the message, as soon as another rank ends
        else:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
