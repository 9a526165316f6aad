"""The events of `TransfusionPipeline.stream`, in the order in which rows give them."""

from dataclasses import dataclass
from typing import Literal

from PIL import Image

from megafusion.generate.decoder import DenoisingStep


@dataclass(frozen=True)
class TextDelta:
    """Text that follows a row's text so far; whole characters."""

    row: int
    text: str


@dataclass(frozen=True)
class ImageStep:
    """A denoising step of the images of some rows; see DenoisingStep."""

    rows: tuple[int, ...]
    state: DenoisingStep


@dataclass(frozen=True)
class ImagePreview:
    """A row's image as the model expects it to become, after some of the denoising steps."""

    row: int
    image: Image.Image
    step: int
    num_steps: int


@dataclass(frozen=True)
class ImageDone:
    """A row's next image."""

    row: int
    image: Image.Image


@dataclass(frozen=True)
class RowDone:
    """A row's end: the model's eos, a stop text, a limit of tokens or positions, or `cancel`."""

    row: int
    reason: Literal["eos", "stop", "length", "cancelled"]


Event = TextDelta | ImageStep | ImagePreview | ImageDone | RowDone
