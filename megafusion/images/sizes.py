"""Image sizes, each a height and a width."""

from collections.abc import Sequence
from fractions import Fraction

from megafusion.errors import UserError

Size = tuple[int, int]


def nearest_size(height: int, width: int, sizes: Sequence[Size]) -> int:
    """Index of the size nearest in aspect ratio, on a logarithmic scale; the first of equally near ones.

    Exact: ratios are compared as fractions, so that no rounding decides.
    """

    def stretch(size: Size) -> Fraction:
        ratio = Fraction(height * size[1], width * size[0])
        return max(ratio, 1 / ratio)

    return min(range(len(sizes)), key=lambda index: stretch(sizes[index]))


def bounding_size(sizes: Sequence[Size]) -> Size:
    """The smallest height and width that every size fits in."""
    return max(height for height, _ in sizes), max(width for _, width in sizes)


def format_sizes(sizes: Sequence[Size]) -> str:
    """Sizes as HEIGHTxWIDTH, comma-separated: 32x32, 24x40."""
    return ", ".join(f"{height}x{width}" for height, width in sizes)


def parse_size(text: str, option: str = "--size") -> Size:
    """Height and width of HxW in pixels. UserError for anything else."""
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise UserError(f"{option} {text}: is not HEIGHTxWIDTH in pixels, as 256x320")
    return int(height), int(width)
