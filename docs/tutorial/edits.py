"""Make edits from the emoji pack: an image, an instruction, and the image that it asks for.

    python docs/tutorial/edits.py data/edits/raw

Two kinds: "make it flat style" and back, of the quickstart's 66 concepts; "make it blue", between its six
colors of hearts. Between instruction and target stands what the target shows, which the model is to write
before it draws. Writes the images, documents.jsonl for training, and held-out.jsonl; its pairs of source and
target are in no document: every second concept is held out in one of the two directions, and every fourth
edit of a color.
"""

import json
import re
import sys
from itertools import permutations
from pathlib import Path

from data_prep.readers.webdataset import tar_pairs
from megafusion.storage import write_file

PACK = Path("data_prep/emoji")
HEART = re.compile(r"(red|yellow|green|blue|purple|black) heart, (3d|flat) style")


def style_edits(captions: dict[str, str]) -> list[tuple[str, str, str]]:
    """Source, instruction and target of both directions of every concept, sorted by concept."""
    concepts = sorted({key.rpartition("-")[0] for key in captions})
    return [
        (f"{concept}-{source}", f"make it {target} style:", f"{concept}-{target}")
        for concept in concepts
        for source, target in permutations(("3d", "flat"))
    ]


def color_edits(captions: dict[str, str]) -> list[tuple[str, str, str]]:
    """Source, instruction and target of every change of a heart's color within a style."""
    hearts: dict[str, dict[str, str]] = {"3d": {}, "flat": {}}
    for key, caption in sorted(captions.items()):
        if match := HEART.fullmatch(caption):
            hearts[match[2]][match[1]] = key
    return [
        (keys[source], f"make it {target}:", keys[target])
        for keys in hearts.values()
        for source, target in permutations(keys, 2)
    ]


def document(source: str, text: str, target: str) -> dict:
    """An interleaved document: the source, which is given, a text and the target."""
    return {
        "texts": [None, text, None],
        "images": [f"{source}.webp", None, f"{target}.webp"],
        "given": [True, None, None],
    }


def main(out: Path) -> None:
    starter = set((PACK / "starter.txt").read_text().split())
    pairs = {pair.key: pair for pair in tar_pairs(PACK / "emoji-000000.tar") if pair.key in starter}
    captions = {key: pair.caption.decode() for key, pair in pairs.items()}
    (out / "images").mkdir(parents=True, exist_ok=True)
    for key, pair in pairs.items():
        write_file(out / "images" / f"{key}.webp", pair.image)
    styles, colors = style_edits(captions), color_edits(captions)
    # Two edits a concept: the first of every fourth concept, the second of the second after it.
    held_out = [edit for number, edit in enumerate(styles) if number % 8 in (0, 5)] + colors[::4]
    documents = [
        document(source, f"{instruction} {captions[target]}", target)
        for source, instruction, target in styles + colors
        if (source, instruction, target) not in held_out
    ]
    edits = [dict(zip(("source", "instruction", "target"), edit, strict=True)) for edit in held_out]
    for name, rows in (("documents", documents), ("held-out", edits)):
        write_file(out / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        print(f"{out / name}.jsonl: {len(rows)} edits")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
