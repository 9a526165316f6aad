"""Grids of images with captions, for people to look at."""

import io
import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont


def make_image_grid(
    rows: Sequence[tuple[str, *tuple[Image.Image, ...]]],
    headings: Sequence[str] = (),
    *,
    columns: int = 4,
    side: int = 96,
) -> Image.Image:
    """Cells of one or several images side by side above their caption, `columns` cells across.

    rows: a caption and its images, each scaled so that its longer side has `side` pixels. headings: a label
    above each image of every cell.
    """
    font = ImageFont.load_default(size=12)
    num_images = max(len(row) - 1 for row in rows)
    cell_width, heading_height, text_height = num_images * (side + 4) + 12, 16 if headings else 0, 34
    cell_height = heading_height + side + text_height + 6
    num_lines = -(-len(rows) // columns)
    grid = Image.new("RGB", (columns * cell_width + 12, num_lines * cell_height + 12), "white")
    pen = ImageDraw.Draw(grid)
    for cell, (caption, *images) in enumerate(rows):
        left = 12 + cell % columns * cell_width
        top = 8 + cell // columns * cell_height
        for index, image in enumerate(images):
            x = left + index * (side + 4)
            if headings:
                pen.text((x, top), headings[index], fill="#888888", font=font)
            size = [max(1, round(pixels * side / max(image.size))) for pixels in image.size]
            shown = image.resize(size, Image.Resampling.LANCZOS)
            x, y = x + (side - shown.width) // 2, top + heading_height + (side - shown.height) // 2
            grid.paste(shown, (x, y))
        wrapped = "\n".join(textwrap.wrap(caption, width=max(14, cell_width // 7))[:2])
        pen.multiline_text(
            (left, top + heading_height + side + 2), wrapped, fill="black", font=font, spacing=2
        )
    return grid


def encode_png(image: Image.Image) -> bytes:
    """An image as the bytes of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
