"""Inputs and outputs of `megafusion generate`: prompts, parts of an interleaved one, images, answers."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megafusion.errors import UserError
from megafusion.sequence.text import clean_text
from megafusion.storage import write_file

if TYPE_CHECKING:
    from PIL import Image

    from megafusion.generate.row import Part


def parse_part(part: str) -> "Part":
    """A part of --interleave: a text, or an image where it begins with one @."""
    if part.startswith("@@"):
        return part[1:]
    if not part.startswith("@"):
        return part
    from megafusion.images.reader import load_image

    return load_image(part[1:])


def read_prompts(path: Path) -> list[str]:
    """The lines of a file that are not blank."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts {path}: not a readable text file ({error})") from error
    if not (prompts := [line for line in lines if clean_text(line)]):
        raise UserError(f"--prompts {path}: has no prompts; write one a line")
    return prompts


def write_answer(answer: "Sequence[Part]", out: Path) -> list[str]:
    """Save the images of an answer to --interleave; a line for each of its parts."""
    lines = []
    for number, part in enumerate(answer):
        text = part if isinstance(part, str) else save_image(part, out / f"answer-{number}.png")
        lines.append(f"answer {number}: {text}")
    return lines or ["answer: nothing (the model ended at once)"]


def save_image(image: "Image.Image", path: Path) -> Path:
    """Write an image as PNG; gives its path."""
    from megafusion.images.grid import encode_png

    write_file(path, encode_png(image))
    return path


def file_name(text: str) -> str:
    """A text as the part of a file's name that tells of it."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60] or "prompt"
