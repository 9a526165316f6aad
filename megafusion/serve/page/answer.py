"""Answers as far as they are, from the events of their rows."""

import base64
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from megafusion.generate.events import ImageDone, ImagePreview, RowDone, TextDelta
from megafusion.generate.row import Part
from megafusion.images.grid import encode_png

MIN_INTERVAL = 0.1
"""Seconds between two updates of what a browser shows."""


def png_address(image: Image.Image) -> str:
    """An image as the data URL of a PNG."""
    return f"data:image/png;base64,{base64.b64encode(encode_png(image)).decode()}"


@dataclass
class Answer:
    """A row's answer so far.

    preview: the image that is being denoised, as the model expects it to become, after `step` of num_steps.
    addresses: data URLs of the images, each encoded once for all updates. reason: of the row's end, as
    RowDone has it.
    """

    parts: list[Part] = field(default_factory=list)
    addresses: list[str] = field(default_factory=list)
    preview: Image.Image | None = None
    step: int = 0
    num_steps: int = 0
    reason: str | None = None

    @property
    def images(self) -> list[Image.Image]:
        """The images that are done."""
        return [part for part in self.parts if not isinstance(part, str)]

    @property
    def text(self) -> str:
        """The texts, joined by spaces."""
        return " ".join(part.strip() for part in self.parts if isinstance(part, str)).strip()

    def add(self, event: Any) -> None:
        """Take one of the row's events."""
        match event:
            case TextDelta(text=text):
                if self.parts and isinstance(self.parts[-1], str):
                    self.parts[-1] += text
                else:
                    self.parts.append(text)
            case ImagePreview(image=image, step=step, num_steps=num_steps):
                self.preview, self.step, self.num_steps = image, step, num_steps
            case ImageDone(image=image):
                self.parts.append(image)
                self.addresses.append(png_address(image))
                self.preview = None
            case RowDone(reason=reason):
                self.reason = reason


async def follow(events: AsyncIterator[Any], num_rows: int) -> AsyncIterator[list[Answer]]:
    """The answers of rows: empty at first, then as they grow, whole at last; the same list each time."""
    answers = [Answer() for _ in range(num_rows)]
    yield answers
    shown = time.monotonic()
    async for event in events:
        if not isinstance(event, TextDelta | ImagePreview | ImageDone | RowDone):
            continue  # the end of all rows
        answers[event.row].add(event)
        steps = {answer.step for answer in answers if answer.preview is not None}
        if len(steps) <= 1 and time.monotonic() - shown >= MIN_INTERVAL:
            yield answers
            shown = time.monotonic()
    yield answers
