"""Records: the unit of input, each with a location from which any process can read it again."""

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

from megafusion.errors import UserError

UNKNOWN = 0
NOT_TEXT = "holds NUL characters: UTF-16 without its mark, binary, or blocks that were never written"


class BadRecord(UserError):
    """An invalid input, and why; the caller adds where it is.

    reason: counted in the report, so one of few. detail: added to the message alone. num_lost: inputs that
    are lost with it; UNKNOWN where a file is cut, and does not tell.
    """

    def __init__(self, reason: str, detail: str = "", num_lost: int = 1):
        super().__init__(f"{reason}; {detail}" if detail else reason)
        self.reason, self.num_lost = reason, num_lost


class Dropped(Exception):
    """A valid input that a filter drops, and why."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


class Record(NamedTuple):
    """One input: its key or line, its location in the file, and a problem that is known before it is read.

    num_lost: see BadRecord.
    """

    key: str
    location: Any = None
    problem: str | None = None
    num_lost: int = 1


class RawPair(NamedTuple):
    """An image, still encoded, with its caption and scores as found."""

    key: str
    image: bytes
    caption: bytes | str | None
    scores: dict


class Reader(Protocol):
    """Reads the records of an input split: lists them in order, and reads each by its location."""

    def records(self, *span: Any, **_: Any) -> Iterator[Record]:
        """Records in the file's order; a corrupt one, or several, have a problem.

        span: first and end, of a reader of files that are scanned in parts. Lines are numbered within it.
        """

    def read(self, record: Record) -> Any:
        """A RawPair, a text (str), or a document's segments (list of str and bytes). Raises BadRecord."""

    def where(self, record: Record) -> str:
        """The file and the record, as error messages name them."""
