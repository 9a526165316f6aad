"""Make edits from the emoji pack: an image, an instruction, and the image that it asks for.

    python docs/tutorial/edits.py data/edits/raw

Two kinds: "make it flat style" and back, of every concept that the pack has in both styles; "make it blue",
of hearts, circles and squares. Writes the images, edits.jsonl for training and held-out.jsonl, whose pairs of
source and target are in no edit for training: of the quickstart's 66 concepts every second is held out in one
of the two directions, and of the edits between its six colors of hearts every fourth.
"""

import io
import json
import re
import sys
from itertools import permutations
from pathlib import Path

from PIL import Image, ImageOps

from data_prep.readers.webdataset import tar_pairs
from megafusion.storage import write_file

PACK = Path("data_prep/emoji")
STYLES = ("3d", "flat")
COLORS = "red|orange|yellow|green|light blue|blue|purple|brown|black|white|pink|grey"
COLORED = re.compile(rf"({COLORS}) (heart|circle|square), (3d|flat) style")


def style_edits(keys: set[str]) -> list[dict]:
    """Both directions of every concept of two styles, sorted by concept."""
    concepts = sorted({key.rpartition("-")[0] for key in keys})
    both = [concept for concept in concepts if all(f"{concept}-{style}" in keys for style in STYLES)]
    return [
        edit(f"{concept}-{source}", f"make it {target} style", f"{concept}-{target}")
        for concept in both
        for source, target in permutations(STYLES)
    ]


def color_edits(captions: dict[str, str]) -> list[dict]:
    """Every change of color within a shape and a style."""
    families: dict[tuple[str, str], dict[str, str]] = {}
    for key, caption in sorted(captions.items()):
        if match := COLORED.fullmatch(caption):
            families.setdefault((match[2], match[3]), {})[match[1]] = key
    return [
        edit(keys[source], f"make it {target}", keys[target])
        for keys in families.values()
        for source, target in permutations(keys, 2)
    ]


def edit(source: str, instruction: str, target: str) -> dict:
    """A line of a file of edits."""
    return {"source": f"{source}.webp", "instruction": instruction, "target": f"{target}.webp"}


def mirrored(content: bytes) -> bytes:
    """An encoded image, mirrored left to right."""
    buffer = io.BytesIO()
    ImageOps.mirror(Image.open(io.BytesIO(content))).save(buffer, "WEBP", quality=90)
    return buffer.getvalue()


def main(out: Path) -> None:
    pairs = {pair.key: pair for pair in tar_pairs(PACK / "emoji-000000.tar")}
    captions = {key: pair.caption.decode() for key, pair in pairs.items()}
    starter = set((PACK / "starter.txt").read_text().split())
    styles, colors = style_edits(set(pairs)), color_edits(captions)
    # Two edits a concept: the first of every fourth concept, the second of the second after it.
    known = [each for each in styles if each["target"].removesuffix(".webp") in starter]
    hearts = [e for e in colors if {e[n].removesuffix(".webp") for n in ("source", "target")} <= starter]
    held_out = [each for number, each in enumerate(known) if number % 8 in (0, 5)] + hearts[::4]
    kept = [each for each in styles if each not in held_out]
    # Mirrored alike, source and target are an edit too.
    mirrors = [each | {name: f"mirrored-{each[name]}" for name in ("source", "target")} for each in kept]
    edits = kept + mirrors + [each for each in colors if each not in held_out]
    (out / "images").mkdir(parents=True, exist_ok=True)
    for name in sorted({each[name] for each in held_out + edits for name in ("source", "target")}):
        key = name.removesuffix(".webp").removeprefix("mirrored-")
        content = pairs[key].image
        write_file(out / "images" / name, mirrored(content) if name.startswith("mirrored-") else content)
    for file, rows in (("edits", edits), ("held-out", held_out)):
        write_file(out / f"{file}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        print(f"{out / file}.jsonl: {len(rows)} edits")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
