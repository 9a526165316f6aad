"""State of a logical stream: a few integers for each source and waiting document, saved with checkpoints."""

from dataclasses import dataclass, field
from typing import NamedTuple


class DocumentKey(NamedTuple):
    """A document of a stream: the index `order` in the stream's order of one epoch of a source."""

    source: str
    epoch: int
    order: int


class Cursor(NamedTuple):
    """Where a stream reads next in a source: an epoch, a document of it, a position of the document."""

    epoch: int
    order: int
    start: int


@dataclass(eq=False)
class Pending:
    """A document that has been read and not packed, or what is left of it: its positions [start, end)."""

    key: DocumentKey
    start: int
    end: int
    num_images: int
    """Images in these positions."""


@dataclass
class StreamState:
    """Everything that a logical stream remembers."""

    position: dict[str, Cursor]
    """By source."""
    positions_packed: dict[str, int]
    """By source: sequence positions packed so far. They steer the mixture."""
    pending: list[Pending] = field(default_factory=list)
    """Oldest first: the packing buffer."""
    num_read: int = 0
    """Documents read so far, skipped ones included."""
    skipped: dict[str, int] = field(default_factory=dict)
    """By reason: documents skipped so far."""

    @classmethod
    def from_state_dict(cls, state: dict) -> "StreamState":
        """The state that `state_dict` gave."""
        return cls(
            {name: Cursor(*cursor) for name, cursor in state["position"].items()},
            dict(state["positions_packed"]),
            [Pending(DocumentKey(*values[:3]), *values[3:]) for values in state["pending"]],
            state["num_read"],
            dict(state["skipped"]),
        )

    def state_dict(self) -> dict:
        """A copy in plain values, which JSON can hold: cursors and pending documents are lists."""
        return {
            "position": {name: list(cursor) for name, cursor in self.position.items()},
            "positions_packed": dict(self.positions_packed),
            "pending": [[*p.key, p.start, p.end, p.num_images] for p in self.pending],
            "num_read": self.num_read,
            "skipped": dict(self.skipped),
        }
