"""The one exception that means: the user can fix this."""


class UserError(ValueError):
    """Bad input from outside (a file, a key, a value).

    The message names what is wrong and the way out. The command line prints it without a traceback
    and exits with status 2; anything else that escapes is a defect of ours and keeps its traceback.
    """

    on_every_rank = False
    """Every rank of a run raises this one with the same message, which rank 0 shows."""

    exit_status = 2
    """1 where the configuration is right and yet starting again would not help."""
