"""The exception for errors that the user can fix."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Bad input from outside (a file, a key, a value).

    The message names the fault and the way out. The command line prints it without a traceback; any other
    exception that escapes is a bug and keeps its traceback. on_every_rank: every rank of a run raises this
    error with the same message, which rank 0 prints. exit_status: an ExitStatus; None for REFUSED.
    """

    def __init__(self, message: str, *, on_every_rank: bool = False, exit_status: int | None = None):
        super().__init__(message)
        self.on_every_rank, self.exit_status = on_every_rank, exit_status


@contextmanager
def refuse_os_errors(fault: str, way_out: str = "") -> Iterator[None]:
    """Raise an OSError of the block as a UserError. fault: a file or folder, and that it cannot be ..."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{fault} ({error.strerror or error}){way_out}") from error
