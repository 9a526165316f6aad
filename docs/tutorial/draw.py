"""Draw the tutorial's images: 1,080 coloured shapes of 64 x 64 pixels, a .txt caption beside each.

python docs/tutorial/draw.py data/shapes

60 combinations go to FOLDER/held-out, the others to FOLDER/train: the model never sees the former, but each
of their words in other combinations.
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
SHAPES = ("circle", "square", "triangle", "diamond", "ring")
RADII = {"small": 6, "medium": 10, "large": 14}
X, Y = {"left": 17, "centre": 32, "right": 47}, {"top": 17, "middle": 32, "bottom": 47}
SIDE = 64


def caption_of(combination: tuple[str, ...]) -> str:
    size, color, shape, y, x = combination
    return f"a {size} {color} {shape} at the {y} {x}"


def combinations() -> list[tuple[str, ...]]:
    return list(itertools.product(RADII, COLORS, SHAPES, Y, X))


def held_out() -> set[int]:
    """Indices of the combinations that are not trained on."""
    return set(random.Random(0).sample(range(len(combinations())), 60))


def draw(combination: tuple[str, ...]) -> Image.Image:
    scale = 4  # drawn larger, then resized: smooth edges
    image = Image.new("RGB", (SIDE * scale, SIDE * scale), "white")
    size, color, shape, y_name, x_name = combination
    pen, fill = ImageDraw.Draw(image), COLORS[color]
    r, x, y = RADII[size] * scale, X[x_name] * scale, Y[y_name] * scale
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
