"""Judge edits: does the image show the asked style or color, and the concept of its source?

    python docs/tutorial/judge_edits.py runs/edits/pipeline data/edits/raw/held-out.jsonl

The emoji pack's classifier names the concept (a heart's color is part of its name there); it must name every
real target. The style is told by a linear probe on the classifier's features, fitted to the pack's real
images; its accuracy on real images of concepts that it was not fitted to is printed. A sheet of sources,
targets and edits is written beside the pipeline.
"""

import json
import sys
from pathlib import Path

import torch
from torch import Tensor

from data_prep.emoji.classifier import IMAGE_SIZE, ImageClassifier
from data_prep.emoji.distortions import corrupt
from data_prep.emoji.train_classifier import read_pack
from megafusion import TransfusionPipeline
from megafusion.images.grid import encode_png, make_image_grid
from megafusion.images.processor import preprocess_images
from megafusion.images.reader import read_image
from megafusion.storage import write_file

PACK = Path("data_prep/emoji")
DISTORTIONS = ("clean", "blur", "blur and noise")


class StyleProbe:
    """A linear probe of style, "3d" or "flat", on the features of the classifier; every eighth concept of the
    pack is left out of the fit, and `accuracy` is that on its images."""

    def __init__(self, classifier: ImageClassifier):
        self._classifier = classifier
        images = read_pack(PACK / "emoji-000000.tar")
        concepts = sorted({key.rpartition("-")[0] for key in images})
        is_left_out = {concept: number % 8 == 0 for number, concept in enumerate(concepts)}
        left_out = torch.tensor([is_left_out[key.rpartition("-")[0]] for key in images])
        is_flat = torch.tensor([key.endswith("-flat") for key in images])
        pixels = torch.stack(list(images.values()))
        features = [self._features(corrupt(pixels, name)) for name in DISTORTIONS]
        fitted = torch.cat([each[~left_out] for each in features]).double()
        wanted = (2.0 * is_flat[~left_out] - 1).repeat(len(DISTORTIONS)).double()
        ridge = len(fitted) * 1e-3 * torch.eye(fitted.shape[1], dtype=torch.float64)
        self._weights = torch.linalg.solve(fitted.T @ fitted + ridge, fitted.T @ wanted).float()
        self.accuracy = {
            name: ((each[left_out] @ self._weights > 0) == is_flat[left_out]).float().mean().item()
            for name, each in zip(DISTORTIONS, features, strict=True)
        }

    def __call__(self, images_N3HW: Tensor) -> list[str]:
        """The style of each image of [N, 3, 64, 64] in [0, 1]."""
        return ["flat" if score > 0 else "3d" for score in self._features(images_N3HW) @ self._weights]

    @torch.no_grad()
    def _features(self, images_N3HW: Tensor) -> Tensor:
        features = self._classifier.features(images_N3HW - 0.5)
        return torch.cat([features, torch.ones(len(features), 1)], 1)


def judge(edits: list[dict], classes: list[str], styles: list[str]) -> dict:
    """Shares of edits whose image shows the asked target and the source's concept, and both; by kind."""
    right: dict[str, list[tuple[bool, bool]]] = {}
    for edit, name, style in zip(edits, classes, styles, strict=True):
        source, target = (edit[key].removesuffix(".webp").rpartition("-") for key in ("source", "target"))
        concept, _, drawn_style = name.rpartition("-")
        if edit["instruction"].endswith("style"):
            right.setdefault("style", []).append((style == target[2], concept == source[0]))
        else:  # a heart of this color; its style is the source's
            right.setdefault("color", []).append((concept == target[0], drawn_style == source[2]))
    right["all"] = [each for kind in right.values() for each in kind]
    return {
        kind: {
            "edits": len(each),
            "target": round(sum(target for target, _ in each) / len(each), 3),
            "rest": round(sum(rest for _, rest in each) / len(each), 3),
            "both": round(sum(all(pair) for pair in each) / len(each), 3),
        }
        for kind, each in right.items()
    }


def main(pipeline_folder: str, path: Path) -> None:
    edits = [json.loads(line) for line in path.read_text().splitlines()]
    names = {edit[key] for edit in edits for key in ("source", "target")}
    read = {name: read_image((path.parent / "images" / name).read_bytes()) for name in sorted(names)}
    classifier = ImageClassifier.load(PACK / "classifier.safetensors")
    probe = StyleProbe(classifier)

    def look_at(images: list) -> tuple[list[str], list[str]]:
        pixels = preprocess_images(images, IMAGE_SIZE, IMAGE_SIZE) / 2 + 0.5
        return classifier.classify(pixels), probe(pixels)

    wanted = [edit["target"].removesuffix(".webp") for edit in edits]
    classes, styles = look_at([read[edit["target"]] for edit in edits])
    if classes != wanted:
        sys.exit("error: the classifier does not name the real targets, so it cannot judge")
    figures = {"probe on real images": probe.accuracy, "real targets": judge(edits, classes, styles)}
    copies = look_at([read[edit["source"]] for edit in edits])
    figures["sources, unedited"] = judge(edits, *copies)
    pipeline = TransfusionPipeline.from_pretrained(pipeline_folder)
    sampling = pipeline.config.sampling.model_copy(update={"max_new_tokens": 0})
    prompts = [[read[edit["source"]], edit["instruction"]] for edit in edits]
    drawn = [parts[0] for parts in pipeline.generate(prompts, begin="image", sampling=sampling)]
    classes, styles = look_at(drawn)
    figures["edits"] = judge(edits, classes, styles)
    figures["named exactly as the target"] = sum(map(str.__eq__, classes, wanted)) / len(edits)
    cells = [
        (f"{edit['instruction']}: {name}, {style}", read[edit["source"]], read[edit["target"]], image)
        for edit, image, name, style in zip(edits, drawn, classes, styles, strict=True)
    ]
    sheet = Path(pipeline_folder).parent / "edits.png"
    write_file(sheet, encode_png(make_image_grid(cells, ("source", "target", "edited"))))
    print(json.dumps(figures, indent=1))
    print(f"{sheet}: sources, targets and edits")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
