"""Sheets of pictures with their captions, for people to look at."""

import io
import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont


def picture_sheet(
    rows: Sequence[tuple[str, *tuple[Image.Image, ...]]],
    headings: Sequence[str] = (),
    *,
    columns: int = 4,
    side: int = 96,
) -> Image.Image:
    """Cells of one or several pictures side by side above their caption, `columns` cells across.

    rows: a caption and its pictures, each; the longer side of a picture fills its place. headings: a word
    above the pictures of every cell.
    """
    font = ImageFont.load_default(size=12)
    num_pictures = max(len(row) - 1 for row in rows)
    cell_width, heading_height, text_height = num_pictures * (side + 4) + 12, 16 if headings else 0, 34
    cell_height = heading_height + side + text_height + 6
    num_lines = -(-len(rows) // columns)
    sheet = Image.new("RGB", (columns * cell_width + 12, num_lines * cell_height + 12), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (caption, *pictures) in enumerate(rows):
        left = 12 + number % columns * cell_width
        top = 8 + number // columns * cell_height
        for position, picture in enumerate(pictures):
            x = left + position * (side + 4)
            if headings:
                pen.text((x, top), headings[position], fill="#888888", font=font)
            size = [max(1, round(pixels * side / max(picture.size))) for pixels in picture.size]
            shown = picture.resize(size, Image.Resampling.LANCZOS)
            x, y = x + (side - shown.width) // 2, top + heading_height + (side - shown.height) // 2
            sheet.paste(shown, (x, y))
        wrapped = "\n".join(textwrap.wrap(caption, width=max(14, cell_width // 7))[:2])
        pen.multiline_text(
            (left, top + heading_height + side + 2), wrapped, fill="black", font=font, spacing=2
        )
    return sheet


def png(picture: Image.Image) -> bytes:
    """A picture as the bytes of a PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()
