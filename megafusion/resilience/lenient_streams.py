"""Standard streams that ignore write errors: a log on a full disk must not end a run."""

import sys
from contextlib import suppress
from typing import Any, TextIO


class _LenientStream:
    """A stream that drops text it cannot write."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def ignore_write_errors() -> None:
    """Make standard output and error of this process drop text they cannot write."""
    sys.stdout, sys.stderr = _LenientStream(sys.stdout), _LenientStream(sys.stderr)
