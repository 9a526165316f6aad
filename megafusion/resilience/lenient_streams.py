"""What a run prints when nothing can be printed: a log on a full disk must not end it."""

import sys
from contextlib import suppress
from typing import Any, TextIO


class _Lenient:
    """A stream that drops what cannot be written."""

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


def drop_what_cannot_be_written() -> None:
    """From now on this process' standard output and error refuse nothing."""
    sys.stdout, sys.stderr = _Lenient(sys.stdout), _Lenient(sys.stderr)
