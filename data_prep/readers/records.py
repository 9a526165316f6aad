"""What inputs are made of: records, each at a place that any process can read again."""

from typing import Any, NamedTuple, Protocol

from megafusion.errors import UserError


class BadRecord(UserError):
    """An input that cannot be used, and why; who catches it knows where it stands.

    reason: what is counted, so of few kinds. detail: what a message says beside it.
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}; {detail}" if detail else reason)
        self.reason = reason


class Dropped(Exception):
    """An input that a filter leaves out, and why."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


class Record(NamedTuple):
    """One input: its key or line, its place in the file, and what is wrong with it before it is read."""

    key: str
    at: Any = None
    problem: str | None = None


class Picture(NamedTuple):
    """A picture with its caption as found, still encoded."""

    key: str
    content: bytes
    caption: bytes | str | None
    scores: dict


class Reader(Protocol):
    """The records of a file, or of a few: in their order, and each by its place."""

    def records(self, *part: int) -> Any:
        """Iterator of Record, in the file's order. What is damaged comes as a record with a problem.

        part: of a file that is scanned in parts, first and end. Lines are numbered within it.
        """

    def read(self, record: Record) -> Any:
        """A Picture, a text (str), or a document's parts (list of str and bytes). Raises BadRecord."""

    def where(self, record: Record) -> str:
        """The file and the record, as a message names them."""
