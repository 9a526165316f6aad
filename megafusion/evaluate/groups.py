"""Annotated images as items of a suite, and figures by their group."""

import json
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from megafusion.evaluate.annotations import ALL, AnnotatedImage, read_annotations, spread
from megafusion.evaluate.config import EvaluateConfig
from megafusion.generate.pipeline import TransfusionPipeline
from megafusion.images.grid import encode_png
from megafusion.objective.config import SamplingConfig
from megafusion.storage import file_sha256, write_file


def annotated_images(config: EvaluateConfig) -> tuple[list[AnnotatedImage], dict[str, Any]]:
    """The images of a suite, at most `max_items` of each group, and what its recipe says of them."""
    assert config.annotations
    found = read_annotations(config.annotations, config.image_folder)
    groups = dict.fromkeys(image.group for image in found)
    kept = [
        image
        for group in groups
        for image in spread([i for i in found if i.group == group], config.max_items)
    ]
    contents = [file_sha256(image.path) for image in kept]
    recipe = {
        "annotations": file_sha256(config.annotations),
        "images": sha256(json.dumps(contents).encode()).hexdigest(),
        "items": len(kept),
        "seed": config.seed,
        "sampling": config.sampling,
    }
    return kept, recipe


def by_group(items: Sequence[AnnotatedImage]) -> dict[str, list[int]]:
    """Indices of the items of each group, in the groups' order, and of all where there are several."""
    groups: dict[str, list[int]] = {}
    for index, item in enumerate(items):
        groups.setdefault(item.group, []).append(index)
    return groups if len(groups) == 1 else groups | {ALL: list(range(len(items)))}


def sampling_of(pipeline: TransfusionPipeline, config: EvaluateConfig) -> SamplingConfig:
    """The model's sampling with the evaluation's changes."""
    return pipeline.config.sampling.model_copy(update=config.sampling)


def draw(
    pipeline: TransfusionPipeline, config: EvaluateConfig, first: int, prompts: Sequence[str], folder: Path
) -> list[str]:
    """Draw a prompt for each item from number `first` on; the names of the files in the folder."""
    seeds = [config.seed + first + number for number in range(len(prompts))]
    drawn = pipeline.draw(prompts, seed=seeds, sampling=sampling_of(pipeline, config))
    names = [f"drawn/{first + number:06d}.png" for number in range(len(prompts))]
    for name, image in zip(names, drawn, strict=True):
        write_file(folder / name, encode_png(image))
    return names
