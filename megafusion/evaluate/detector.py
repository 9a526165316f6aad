"""Detectors of objects in drawn images: a model of transformers in a folder, or a function of the user's."""

import importlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from megafusion.errors import UserError

WAYS = (
    "give detector=FOLDER, an object detection model of transformers (as DETR trained on COCO) saved there "
    "as safetensors with its image processor, or detector=MODULE:FUNCTION of your own, which takes a PIL "
    "image and returns a list of objects with label, score, box [left, top, right, bottom] and, if it knows "
    "it, color"
)


class Found(NamedTuple):
    """An object in an image; color: None where the detector names none."""

    label: str
    score: float
    box: tuple[float, float, float, float]
    color: str | None = None


Detector = Callable[[Image.Image], list[Found]]


def load_detector(name: str) -> Detector:
    """The detector that an option names. UserError where there is none."""
    if Path(name).is_dir():
        return _from_folder(Path(name))
    module, colon, function = name.partition(":")
    if not colon or not all(part.isidentifier() for part in (*module.split("."), function)):
        raise UserError(f"detector: {name}: neither a folder nor MODULE:FUNCTION; {WAYS}")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise UserError(f"detector: {name}: cannot be imported ({error}); {WAYS}") from error
    if not callable(found):
        raise UserError(f"detector: {name}: is not a function; {WAYS}")
    return lambda image: [_checked(name, each) for each in _listed(name, found(image))]


def _listed(name: str, objects: Any) -> Sequence[Any]:
    if not isinstance(objects, list | tuple):
        raise UserError(f"detector: {name}: returned {type(objects).__name__}, no list of objects; {WAYS}")
    return objects


def _checked(name: str, values: Any) -> Found:
    """An object that a user's function returned. UserError where it is none."""
    try:
        left, top, right, bottom = map(float, values["box"])
        color = values.get("color")
        box = left, top, right, bottom
        found = Found(str(values["label"]), float(values["score"]), box, color and str(color))
        if all(map(math.isfinite, [*box, found.score])):
            return found
    except (KeyError, TypeError, ValueError, AttributeError):
        pass
    raise UserError(f"detector: {name}: returned {values!r:.200}, which is no object; {WAYS}")


def _from_folder(folder: Path) -> Detector:
    try:
        from transformers import AutoImageProcessor, AutoModelForObjectDetection
    except ImportError as error:
        raise UserError(f"detector: needs transformers; pip install 'megafusion[eval]' ({error})") from error
    try:
        model = AutoModelForObjectDetection.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, trust_remote_code=False
        ).eval()
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"detector: {folder}: no detection model ({reason}); {WAYS}") from error

    @torch.no_grad()
    def detect(image: Image.Image) -> list[Found]:
        outputs = model(**processor(images=image, return_tensors="pt"))
        (found,) = processor.post_process_object_detection(
            outputs, threshold=0.0, target_sizes=[(image.height, image.width)]
        )
        names = model.config.id2label
        triples = zip(
            found["labels"].tolist(), found["scores"].tolist(), found["boxes"].tolist(), strict=True
        )
        return [Found(names[label], score, tuple(box)) for label, score, box in triples]

    return detect
