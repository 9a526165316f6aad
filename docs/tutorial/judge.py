"""Judge a model on the tutorial's held-out captions: its drawings of them, and its captions of their images.

python docs/tutorial/judge.py runs/shapes/pipeline data/shapes/held-out

A drawing is measured without a network: its colour by the nearest of the palette, its size, shape and
position by the overlap with every combination of these. The judge must first get the real images right.
"""

import itertools
import json
import sys
from functools import cache
from pathlib import Path

import numpy as np
from draw import COLORS, RADII, SHAPES, X, Y, draw
from PIL import Image

from megafusion import TransfusionPipeline
from megafusion.images.reader import read_image

WORDS = ("size", "color", "shape", "y", "x")


def mask_of(image: Image.Image) -> np.ndarray:
    """True where a pixel differs from the white background."""
    return (255 - np.asarray(image, float)).sum(-1) > 100


@cache
def templates() -> dict[tuple[str, ...], np.ndarray]:
    """Masks by size, shape and position."""
    names = itertools.product(RADII, SHAPES, Y, X)
    return {(size, shape, y, x): mask_of(draw((size, "red", shape, y, x))) for size, shape, y, x in names}


def judge(image: Image.Image) -> tuple[str, ...]:
    """The combination that an image shows, in the order of WORDS."""
    pixels, mask = np.asarray(image, float), mask_of(image)
    pixel = np.median(pixels[mask], axis=0) if mask.any() else np.full(3, 255.0)
    color = min(COLORS, key=lambda name: np.abs(pixel - np.array(COLORS[name], float)).sum())
    overlap = {name: (mask & t).sum() / (mask | t).sum() for name, t in templates().items()}
    size, shape, y, x = max(overlap, key=overlap.__getitem__)
    return size, color, shape, y, x


def shares(found: list[tuple[str, ...]], wanted: list[tuple[str, ...]]) -> dict[str, float]:
    """Share of images with each word right, and with all five."""
    right = np.array(found) == np.array(wanted)
    return {
        **dict(zip(WORDS, right.mean(0).round(3).tolist(), strict=True)),
        "all": round(float(right.all(1).mean()), 3),
    }


def main(pipeline_folder: str, folder: Path) -> None:
    paths = sorted(folder.glob("*.png"))
    wanted = [tuple(path.stem.split("-")) for path in paths]
    captions = [path.with_suffix(".txt").read_text().strip() for path in paths]
    real = [read_image(path.read_bytes()) for path in paths]
    assert shares([judge(image) for image in real], wanted)["all"] == 1, "the judge misjudges real images"

    pipeline = TransfusionPipeline.from_pretrained(pipeline_folder)
    drawn, written = pipeline.draw(captions), pipeline.describe(real)
    same = [text == caption for text, caption in zip(written, captions, strict=True)]
    report = {
        "captions": len(captions),
        "drawings": shares([judge(image) for image in drawn], wanted),
        "descriptions_exact": round(float(np.mean(same)), 3),
    }
    print(json.dumps(report, indent=1))
    sheet = Image.new("RGB", (64 * 20, 64 * 2 * -(-len(real) // 20)), "white")
    for index, pair in enumerate(zip(real, drawn, strict=True)):
        for below, image in enumerate(pair):
            sheet.paste(image, (64 * (index % 20), 64 * (2 * (index // 20) + below)))
    sheet.save("held-out.png")
    print("held-out.png: above each real image, below it what the model drew from the caption")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
