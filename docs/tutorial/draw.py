"""Draw the tutorial's images: 960 coloured shapes of 64 x 64 pixels, each with its caption in a .txt file beside it.

python docs/tutorial/draw.py data/shapes

60 combinations go to FOLDER/held-out, the others to FOLDER/train: the model never sees the former, but each of their
words in other combinations.
"""

import itertools
import random
import sys
from pathlib import Path

from PIL import Image, ImageDraw

COLORS = {
    "red": (214, 40, 40),
    "orange": (247, 127, 0),
    "yellow": (252, 213, 63),
    "green": (42, 157, 74),
    "blue": (29, 92, 201),
    "purple": (123, 44, 191),
    "pink": (255, 143, 177),
    "brown": (121, 85, 61),
}
BACKGROUNDS = {"white": (255, 255, 255), "black": (20, 20, 20), "grey": (150, 150, 150), "beige": (233, 220, 190)}
SHAPES = ("circle", "square", "triangle", "diamond", "ring")
RADII = {"small": 8, "large": 15}
CENTRES = {"left": 17, "middle": 32, "right": 47}
SIDE = 64


def caption_of(combination: tuple[str, ...]) -> str:
    size, color, shape, background, position = combination
    return f"a {size} {color} {shape} at the {position}, {background} background"


def combinations() -> list[tuple[str, ...]]:
    return list(itertools.product(RADII, COLORS, SHAPES, BACKGROUNDS, CENTRES))


def held_out() -> set[int]:
    """Indices of the combinations that are not trained on."""
    return set(random.Random(0).sample(range(len(combinations())), 60))


def draw(combination: tuple[str, ...]) -> Image.Image:
    size, color, shape, background, position = combination
    scale = 4  # drawn larger, then resized: smooth edges
    image = Image.new("RGB", (SIDE * scale, SIDE * scale), BACKGROUNDS[background])
    pen, x, y, r = ImageDraw.Draw(image), CENTRES[position] * scale, SIDE * scale // 2, RADII[size] * scale
    fill = COLORS[color]
    if shape == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif shape == "square":
        pen.rectangle((x - r, y - r, x + r, y + r), fill=fill)
    elif shape == "triangle":
        pen.polygon([(x, y - r), (x + r, y + r), (x - r, y + r)], fill=fill)
    elif shape == "diamond":
        pen.polygon([(x, y - r), (x + r, y), (x, y + r), (x - r, y)], fill=fill)
    else:
        pen.ellipse((x - r, y - r, x + r, y + r), outline=fill, width=r // 3)
    return image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def main(folder: Path) -> None:
    hidden = held_out()
    for index, combination in enumerate(combinations()):
        part = folder / ("held-out" if index in hidden else "train")
        part.mkdir(parents=True, exist_ok=True)
        name = "-".join(combination)
        draw(combination).save(part / f"{name}.png")
        (part / f"{name}.txt").write_text(caption_of(combination) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
