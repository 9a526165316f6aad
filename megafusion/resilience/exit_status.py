"""Exit statuses of every command, and what each tells a launcher or a queue. Imports no torch."""

import os
from enum import IntEnum


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
