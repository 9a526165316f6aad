"""The geneval suite: whether drawn images hold the objects that prompts ask for (arXiv 2310.11513).

Rules and thresholds are those of GenEval's evaluate_images.py; the detector is the user's, so figures are
comparable with published ones only with its Mask2Former.
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from PIL import Image

from megafusion.errors import UserError
from megafusion.evaluate.clip import Clip
from megafusion.evaluate.config import EvaluateConfig
from megafusion.evaluate.detector import Found, load_detector
from megafusion.evaluate.groups import draw
from megafusion.evaluate.suite import Metrics, model_sha256
from megafusion.generate.pipeline import TransfusionPipeline
from megafusion.images.reader import load_image
from megafusion.storage import file_sha256, read_lines

MIN_SCORE, MIN_SCORE_COUNTING = 0.3, 0.9
MAX_OBJECTS = 16
"""Of a class in an image, those of the highest score."""
OVERLAP = 0.1
"""Share of two objects' extents by which they may overlap and still be beside each other."""
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
POSITIONS = ("left of", "right of", "above", "below")


class GenEval:
    """Each prompt's images, drawn and searched for its objects. folder: where images are written."""

    name = "geneval"

    def __init__(self, config: EvaluateConfig, folder: Path):
        self._config, self._folder = config, folder
        assert config.prompts
        assert config.detector
        prompts, detector = read_prompts(config.prompts), Path(config.detector)
        self._detect = load_detector(config.detector)
        self._clip = Clip(config.clip) if config.clip else None
        self.items: Sequence[tuple[dict, int]] = [
            (prompt, number) for prompt in prompts for number in range(config.images_per_prompt)
        ]
        self.recipe: dict[str, Any] = {
            "prompts": file_sha256(config.prompts),
            "detector": model_sha256(detector) if detector.is_dir() else config.detector,
            "clip": config.clip and model_sha256(config.clip),
            "items": len(self.items),
            "seed": config.seed,
            "sampling": config.sampling,
        }

    def measure(
        self, pipeline: TransfusionPipeline, first: int, items: Sequence[tuple[dict, int]]
    ) -> list[dict]:
        """Draw each prompt and record whether its image is right, and the first reason why not."""
        prompts = [prompt for prompt, _ in items]
        texts = [prompt["prompt"] for prompt in prompts]
        names, records = draw(pipeline, self._config, first, texts, self._folder), []
        for prompt, name in zip(prompts, names, strict=True):
            reason = self.fault(load_image(self._folder / name), prompt)
            records.append({"file": name, "tag": prompt["tag"], "right": not reason, "reason": reason})
        return records

    def fault(self, image: Image.Image, prompt: dict) -> str:
        """The first thing that an image lacks; empty if it is right."""
        least = MIN_SCORE_COUNTING if prompt["tag"] == "counting" else MIN_SCORE
        objects: dict[str, list[Found]] = defaultdict(list)
        for found in sorted(self._detect(image), key=lambda found: -found.score):
            if found.score > least and len(objects[found.label]) < MAX_OBJECTS:
                objects[found.label].append(found)
        return self._fault(image, objects, prompt)

    def _fault(self, image: Image.Image, objects: Mapping[str, list[Found]], prompt: dict) -> str:
        groups: list[list[Found]] = []
        for wanted in prompt["include"]:
            found = objects.get(wanted["class"], [])[: wanted["count"]]
            if len(found) < wanted["count"]:
                return f"{wanted['class']}: {len(found)} of {wanted['count']}"
            if color := wanted.get("color"):
                right = sum(self._color(image, each) == color for each in found)
                if right < wanted["count"]:
                    return f"{wanted['class']}: {right} of {wanted['count']} are {color}"
            if position := wanted.get("position"):
                relation, target = position
                if any(relation not in relations(a, b) for a in found for b in groups[target]):
                    return f"{wanted['class']}: not {relation} the {prompt['include'][target]['class']}"
            groups.append(found)
        for unwanted in prompt.get("exclude", []):
            if len(objects.get(unwanted["class"], [])) >= unwanted["count"]:
                return f"{unwanted['class']}: {unwanted['count']} or more"
        return ""

    def _color(self, image: Image.Image, found: Found) -> str:
        """The detector's color, or CLIP's of the object's box."""
        if found.color:
            return found.color
        if self._clip is None:
            raise UserError(
                "geneval: the detector names no color, and prompts ask for some; give clip=FOLDER, "
                "a CLIP model"
            )
        left, top, right, bottom = found.box
        box = (
            max(0, int(left)),
            max(0, int(top)),
            max(int(left) + 1, round(right)),
            max(int(top) + 1, round(bottom)),
        )
        texts = [f"a photo of a {color} {found.label}" for color in COLORS]
        return COLORS[self._clip.nearest([image.crop(box)], texts)[0]]

    def summarize(self, records: list[dict], device: Any = None) -> dict[str, Metrics]:
        """Share of right images by task, and GenEval's score: the mean of the tasks."""
        tasks: dict[str, list[bool]] = defaultdict(list)
        for record in records:
            tasks[record["tag"]].append(record["right"])
        found: dict[str, Metrics] = {
            tag: {"images": len(right), "geneval": fmean(right)} for tag, right in tasks.items()
        }
        score = fmean(figures["geneval"] for figures in found.values())
        return found | {"all": {"images": len(records), "geneval": score}}


def relations(a: Found, b: Found) -> set[str]:
    """Where an object is of another: by their centers, less a tolerated overlap, by GenEval's rule."""
    boxes = np.array([a.box, b.box]).reshape(2, 2, 2)
    center_a, center_b = boxes.mean(axis=-2)
    size_a, size_b = np.abs(np.diff(boxes, axis=-2))[..., 0, :]
    offset = center_a - center_b
    beyond = np.maximum(np.abs(offset) - OVERLAP * (size_a + size_b), 0) * np.sign(offset)
    if np.all(np.abs(beyond) < 1e-3):
        return set()
    x, y = beyond / np.linalg.norm(offset)
    return {
        name for name, holds in zip(POSITIONS, (x < -0.5, x > 0.5, y < -0.5, y > 0.5), strict=True) if holds
    }


def read_prompts(path: Path) -> list[dict]:
    """Prompts of GenEval's metadata file: JSON lines. Raises UserError with the line that is wrong."""
    prompts = []
    for number, line in enumerate(read_lines(path), 1):
        try:
            prompt = json.loads(line)
            _check_prompt(prompt)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{path}, prompt {number}: {error!r:.100} in {line:.80}; a line has tag, prompt, include "
                "(class, count, and perhaps color, position) and perhaps exclude, as in GenEval's "
                "evaluation_metadata.jsonl"
            ) from error
        prompts.append(prompt)
    return prompts


def _check_prompt(prompt: dict) -> None:
    """Raise ValueError, KeyError, TypeError, IndexError or AttributeError for what is no prompt."""
    if not (
        isinstance(prompt["tag"], str) and isinstance(prompt["prompt"], str) and prompt["prompt"].strip()
    ):
        raise ValueError("tag or prompt is empty")
    if not prompt["include"]:
        raise ValueError("include is empty")
    for number, wanted in enumerate(prompt["include"]):
        if not (
            isinstance(wanted["class"], str) and isinstance(wanted["count"], int) and wanted["count"] > 0
        ):
            raise ValueError("class or count")
        if wanted.get("color") not in (None, *COLORS):
            raise ValueError(f"color {wanted['color']}")
        if position := wanted.get("position"):
            relation, target = position
            if relation not in POSITIONS or not (isinstance(target, int) and 0 <= target < number):
                raise ValueError(f"position {position}")
    for unwanted in prompt.get("exclude", []):
        if not (isinstance(unwanted["class"], str) and isinstance(unwanted["count"], int)):
            raise ValueError("exclude")
