"""Sizes of images, each a height and a width: the one that a picture goes to, the canvas that holds all."""

from collections.abc import Sequence
from fractions import Fraction

Size = tuple[int, int]


def nearest_size(height: int, width: int, sizes: Sequence[Size]) -> int:
    """Index of the size whose aspect ratio is nearest to a picture's, on a logarithmic scale; of several, the
    first. Exact: no rounding decides between two.
    """

    def stretch(size: Size) -> Fraction:
        ratio = Fraction(height * size[1], width * size[0])
        return max(ratio, 1 / ratio)

    return min(range(len(sizes)), key=lambda index: stretch(sizes[index]))


def bounding_size(sizes: Sequence[Size]) -> Size:
    """The smallest height and width that any of the sizes fits in."""
    return max(height for height, _ in sizes), max(width for _, width in sizes)


def say_sizes(sizes: Sequence[Size]) -> str:
    """Sizes in words: 32x32, 24x40."""
    return ", ".join(f"{height}x{width}" for height, width in sizes)
