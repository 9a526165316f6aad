"""Images of three sizes: raw, as shards, and a small run of them."""

from pathlib import Path

from data_prep.config import PreprocessConfig
from data_prep.preprocess import preprocess
from tests.support.raw import drawing, encoded
from tests.support.small import TOKENIZER, small_run

PIXELS = ((32, 32), (24, 40), (48, 16))
SIZES = ((8, 8), (6, 10), (12, 4))
"""Of their latents; of 16, 15 and 12 patches of 2 x 2."""
ASPECTS = ((40, 40), (70, 40), (20, 60), (30, 33), (20, 90), (90, 52))
"""Widths and heights of raw images, of which PIXELS 0, 1, 2, 0, 2, 1 are nearest."""


def write_raw(folder: Path, num: int = 24) -> Path:
    """A folder of images with caption files."""
    folder.mkdir()
    for number in range(num):
        image = drawing(number, ASPECTS[number % len(ASPECTS)])
        (folder / f"{number:03d}.png").write_bytes(encoded(image))
        (folder / f"{number:03d}.txt").write_text(f"drawing {number}, {'wide ' * (number % 3)}")
    return folder


def make_mixed_shards(folder: Path, vae: Path) -> Path:
    """pairs/ with 24 pairs of three sizes in 3 shards, and text/ with the same captions."""
    raw = write_raw(folder / "raw")
    texts = folder / "texts.txt"
    texts.write_text("\n".join(f"a text of {'some ' * (n % 7)}words, {n}" for n in range(40)))
    preprocess(
        PreprocessConfig(
            out=folder,
            tokenizer=TOKENIZER,
            vae=vae,
            images=(raw,),
            image_sizes=PIXELS,
            texts=(texts,),
            documents_per_shard=8,
        )
    )
    return folder


def mixed_run(shards: Path, vae: Path, out: Path) -> dict:
    """Plain values of `small_run` with images of three sizes."""
    values = small_run(shards, vae, out)
    values["model"] |= {"image_sizes": [list(size) for size in PIXELS], "vocab_size": 2050}
    return values
