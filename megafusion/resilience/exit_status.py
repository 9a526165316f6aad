"""Exit statuses of every command, and what each tells a launcher or a queue. Imports no torch."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

from megafusion.errors import UserError


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


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """End the process with the message of a UserError of the block, without a traceback."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_status or ExitStatus.REFUSED)
