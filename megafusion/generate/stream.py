"""The result of `TransfusionPipeline.stream`: the events of a call, one after another."""

from types import TracebackType
from typing import Self

from megafusion.generate.arguments import as_integer
from megafusion.generate.events import Event
from megafusion.generate.generation import Generation
from megafusion.generate.row import Part


class Stream:
    """An iterator of the events of a call; nothing is computed between two of them.

    `with pipeline.stream(...) as stream` closes it at the block's end.
    """

    def __init__(self, generation: Generation):
        self._generation, self._events = generation, iter(generation)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Event:
        return next(self._events)

    def cancel(self, row: int) -> None:
        """End a row before its next step; the images of its batch are denoised to their end."""
        self._generation.cancel(as_integer("row", row, 0, len(self._generation.rows) - 1))

    def close(self) -> None:
        """End every row; the answers so far stay."""
        self._events.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def answers(self) -> list[list[Part]]:
        """Of each row, texts and images so far."""
        return self._generation.answers()
