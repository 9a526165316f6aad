"""Augmentation: an image shifted and scaled at random, on white."""

import math
from random import Random
from typing import NamedTuple

from PIL import Image, ImageOps
from pydantic import Field, field_validator

from megafusion.config import Config

MIN_SCALE, MAX_SCALE = 0.1, 10.0
LANCZOS_RADIUS = 3
"""Half a window of Pillow's filter, in pixels of the smaller of the two images."""


class AugmentationConfig(Config):
    """Random shifts and scales of an image. What lies outside the image is white, as transparency is."""

    max_shift: float = Field(0.1, ge=0, lt=1)
    """Maximum shift right, left, down or up, as a fraction of the image's width or height."""
    scale: tuple[float, float] = (0.8, 1.0)
    """Smallest and largest scale about the centre; below 1 the image shrinks, above 1 its border is cut."""

    @field_validator("scale")
    @classmethod
    def _is_range(cls, scale: tuple[float, float]) -> tuple[float, float]:
        if not MIN_SCALE <= scale[0] <= scale[1] <= MAX_SCALE:
            raise ValueError(f"give the smaller number first, both from {MIN_SCALE} to {MAX_SCALE:.0f}")
        return scale


class CopiesConfig(AugmentationConfig):
    """Shifted and scaled copies of each captioned image, stored beside it."""

    copies: int = Field(32, gt=0, le=4096)
    """Documents of each pair: the first with the image as it is, the others with random shifts and scales."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of shifts and scales, which depend on it, on the pair's key and on the copy's number alone."""

    def augment(self, image: Image.Image, key: str, copy: int) -> Image.Image:
        """A copy of the image of a pair; copy 0 is the image."""
        return sample_affine(self, Random(f"{self.seed}/{copy}/{key}")).apply(image) if copy else image


class Affine(NamedTuple):
    """A shift and a scale of an image, which keep its size."""

    scale: float
    right: float
    """Shift as a fraction of the width."""
    down: float
    """Shift as a fraction of the height."""

    def apply(self, image: Image.Image) -> Image.Image:
        """The image scaled about its centre, then shifted, at its own size, on white."""
        width, height = image.size
        left, top = (
            n / 2 - n * (0.5 + s) / self.scale for n, s in ((width, self.right), (height, self.down))
        )
        right, bottom = left + width / self.scale, top + height / self.scale
        whole = math.ceil(max(0, -left, -top, right - width, bottom - height))
        # White that is wider than the image, and than the filter sees from one pixel, need not be computed.
        seen = math.ceil((2 * LANCZOS_RADIUS + 2) * max(1, 1 / self.scale)) + 2
        border = min(whole, max(width, height, seen))
        columns, rows = range(width), range(height)
        if border < whole:
            columns, rows = self._within(left, width, border), self._within(top, height, border)
        moved = Image.new(image.mode, image.size, "white")
        if columns and rows:
            # Lanczos of a box, and not an affine transform, because it filters what it shrinks.
            box = (
                left + columns.start / self.scale + border,
                top + rows.start / self.scale + border,
                left + columns.stop / self.scale + border,
                top + rows.stop / self.scale + border,
            )
            around = ImageOps.expand(image, border, "white")
            shown = around.resize((len(columns), len(rows)), Image.Resampling.LANCZOS, box)
            moved.paste(shown, (columns.start, rows.start))
        return moved

    def _within(self, start: float, length: int, border: int) -> range:
        """Pixels along an axis that come from the image or its border; the first, from `start`."""
        first, last = ((edge - start) * self.scale for edge in (-border, length + border))
        return range(max(0, math.ceil(first)), min(length, math.floor(last)))


def sample_affine(config: AugmentationConfig, random: Random) -> Affine:
    """A shift and a scale of the configured ranges, uniform."""
    shift = config.max_shift
    return Affine(random.uniform(*config.scale), random.uniform(-shift, shift), random.uniform(-shift, shift))
