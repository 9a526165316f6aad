"""Judge edits: does the image show what was asked for, and the concept of its source?

    python docs/tutorial/judge_edits.py runs/edits/pipeline data/edits/raw/held-out.jsonl

The emoji pack's classifier names what was drawn: its concept, which of a heart is its color, and its style.
It must name every real target. A sheet of sources, targets and edits is written beside the pipeline.
"""

import json
import sys
from itertools import compress
from pathlib import Path

from PIL import Image

from megafusion import TransfusionPipeline
from megafusion.evaluate.classifier import IMAGE_SIZE, ImageClassifier
from megafusion.images.grid import encode_png, make_image_grid
from megafusion.images.processor import preprocess_images
from megafusion.images.reader import read_image
from megafusion.storage import write_file

CLASSIFIER = Path("data_prep/emoji/classifier.safetensors")
NOTHING = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), "white")
"""Stands for an image that the model did not draw; the classifier takes it for none of the concepts."""


def shares(wanted: list[str], found: list[str]) -> dict[str, float]:
    """Shares of images with the target's concept, with its style, and with both."""
    pairs = [(a.rpartition("-"), b.rpartition("-")) for a, b in zip(wanted, found, strict=True)]
    right = {
        "concept": [a[0] == b[0] for a, b in pairs],
        "style": [a[2] == b[2] for a, b in pairs],
        "both": [a == b for a, b in pairs],
    }
    return {"edits": len(pairs)} | {name: round(sum(each) / len(each), 3) for name, each in right.items()}


def main(pipeline_folder: str, path: Path) -> None:
    edits = [json.loads(line) for line in path.read_text().splitlines()]
    keys = {edit[name] for edit in edits for name in ("source", "target")}
    images = {key: read_image((path.parent / "images" / f"{key}.webp").read_bytes()) for key in sorted(keys)}
    classifier = ImageClassifier.load(CLASSIFIER)

    def classify(images: list) -> list[str]:
        return classifier.classify(preprocess_images(images, IMAGE_SIZE, IMAGE_SIZE) / 2 + 0.5)

    wanted = [edit["target"] for edit in edits]
    if classify([images[target] for target in wanted]) != wanted:
        sys.exit("error: the classifier does not name the real targets, so it cannot judge")
    pipeline = TransfusionPipeline.from_pretrained(pipeline_folder)
    answers = pipeline.generate([[images[edit["source"]], edit["instruction"]] for edit in edits])
    drawn = [next((part for part in answer if not isinstance(part, str)), NOTHING) for answer in answers]
    found = classify(drawn)
    is_style = [edit["instruction"].endswith("style:") for edit in edits]
    figures = {"all": shares(wanted, found)}
    for kind, belongs in (("style", is_style), ("color", [not each for each in is_style])):
        if any(belongs):
            figures[kind] = shares(*(list(compress(names, belongs)) for names in (wanted, found)))
    print(json.dumps(figures, indent=1))
    cells = [
        (
            f"{edit['instruction']} {' '.join(part for part in answer if isinstance(part, str))} ({name})",
            images[edit["source"]],
            images[edit["target"]],
            image,
        )
        for edit, answer, image, name in zip(edits, answers, drawn, found, strict=True)
    ]
    sheet = Path(pipeline_folder).parent / "edits.png"
    write_file(sheet, encode_png(make_image_grid(cells, ("source", "target", "edited"))))
    print(f"{sheet}: sources, targets, and what the model wrote and drew")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
