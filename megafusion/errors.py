"""The one exception that means: the user can fix this."""


class UserError(ValueError):
    """Bad input from outside (a file, a key, a value).

    The message names the fault and the way out. The command line prints it without a traceback and exits with
    `exit_status`; any other exception that escapes is a bug and keeps its traceback.
    """

    on_every_rank = False
    """Whether every rank of a run raises this error with the same message, which rank 0 prints."""

    exit_status: int | None = None
    """An ExitStatus; None for REFUSED."""
