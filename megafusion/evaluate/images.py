"""The images suite: what the model draws from captions, against the real images of these captions."""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from megafusion.errors import UserError
from megafusion.evaluate.annotations import AnnotatedImage
from megafusion.evaluate.classifier import IMAGE_SIZE, ImageClassifier
from megafusion.evaluate.config import EvaluateConfig
from megafusion.evaluate.distances import features_of, frechet_distance, kernel_distance
from megafusion.evaluate.groups import annotated_images, by_group, sampling_of
from megafusion.evaluate.inception import load_inception
from megafusion.evaluate.judge import prove, split_key
from megafusion.evaluate.suite import Metrics
from megafusion.generate.arguments import load_image
from megafusion.generate.pipeline import TransfusionPipeline
from megafusion.images.grid import encode_png, make_image_grid
from megafusion.images.processor import preprocess_images, resize_and_crop
from megafusion.storage import write_file

MAX_SHOWN = 48
SEEN = "seen"
"""Group of the images that the model was trained on, where there is one."""


class Images:
    """FID and KID with the user's weights; the judge's verdicts, and a Frechet distance in its features.

    folder: where drawn images and sheets are written.
    """

    name = "images"

    def __init__(self, config: EvaluateConfig, folder: Path):
        self._config, self._folder = config, folder
        if not (config.judge or config.inception):
            raise UserError(
                "images: nothing would measure the drawn images; give judge=FILE, inception=FILE or both"
            )
        self.items: Sequence[AnnotatedImage]
        self.items, self.recipe = annotated_images(config, self.name)
        self._real = [load_image(item.path) for item in self.items]
        self._judge, self.proof = self._open_judge()
        self._inception = load_inception(config.inception) if config.inception else None

    def measure(
        self, pipeline: TransfusionPipeline, first: int, items: Sequence[AnnotatedImage]
    ) -> list[dict]:
        """Draw the first caption of each image; the record names the file."""
        seeds = [self._config.seed + first + number for number in range(len(items))]
        sampling = sampling_of(pipeline, self._config)
        drawn = pipeline.draw([item.captions[0] for item in items], seed=seeds, sampling=sampling)
        names = [f"drawn/{first + number:06d}.png" for number in range(len(items))]
        for name, image in zip(names, drawn, strict=True):
            write_file(self._folder / name, encode_png(image))
        return [{"image_id": item.id, "file": name} for item, name in zip(items, names, strict=True)]

    def summarize(self, records: list[dict], device: Any = "cpu") -> dict[str, Metrics]:
        """Metrics by group of the images, and sheets of them."""
        drawn = [load_image(self._folder / record["file"]) for record in records]
        groups = by_group(self.items)
        metrics: dict[str, Metrics] = {group: {"images": len(chosen)} for group, chosen in groups.items()}
        verdicts = None
        if self._judge:
            verdicts = self._judged(drawn, metrics, groups)
        if self._inception:
            self._distances(drawn, metrics, groups)
        self._write_sheets(drawn, verdicts, groups)
        return metrics

    def _open_judge(self) -> tuple[ImageClassifier | None, dict[str, float]]:
        path = self._config.judge
        if path is None:
            return None, {}
        if unnamed := [item.path for item in self.items if not item.key]:
            raise UserError(f"judge: {self._config.annotations} has no `key` for {unnamed[0].name}; add them")
        judge = ImageClassifier.load(path)
        keys = [str(item.key) for item in self.items]
        return judge, prove(path, judge, _for_judge(self._real), keys)

    def _judged(
        self, drawn: list[Image.Image], metrics: dict[str, Metrics], groups: dict[str, list[int]]
    ) -> list[str]:
        """Add the judge's figures; returns its verdict on each drawn image.

        A drawn image is also compared with the real images of the group `seen`: nearest_seen_concept and
        _style are the shares that a copy of the nearest of these would have right.
        """
        judge = self._judge
        assert judge
        real, fake = (features_of(judge.embed, _for_judge(images)) for images in (self._real, drawn))
        verdicts = judge.classify(_for_judge(drawn))
        wanted = [split_key(str(item.key)) for item in self.items]
        found = [split_key(verdict) for verdict in verdicts]
        seen = torch.tensor([index for index, item in enumerate(self.items) if item.group == SEEN])
        nearest = seen[(fake @ real[seen].T).argmax(-1)].tolist() if len(seen) else []
        chance = [1 / len({pair[part] for pair in wanted}) for part in (0, 1)]
        for group, chosen in groups.items():
            figures = metrics[group]
            for part, name in enumerate(("concept", "style")):
                figures[f"{name}_accuracy"] = fmean(found[i][part] == wanted[i][part] for i in chosen)
                figures[f"{name}_chance"] = chance[part]
                if nearest:
                    figures[f"nearest_seen_{name}"] = fmean(
                        wanted[nearest[i]][part] == wanted[i][part] for i in chosen
                    )
            figures["both_accuracy"] = fmean(found[i] == wanted[i] for i in chosen)
            if len(chosen) > 1:
                figures["judge_frechet_distance"] = frechet_distance(real[chosen], fake[chosen])
        return verdicts

    def _distances(
        self, drawn: list[Image.Image], metrics: dict[str, Metrics], groups: dict[str, list[int]]
    ) -> None:
        embed: Callable[[Tensor], Tensor] | None = self._inception
        assert embed
        # At the size of the drawn image, as its caption's real image was trained on.
        real = [
            resize_and_crop(image, other.height, other.width)
            for image, other in zip(self._real, drawn, strict=True)
        ]
        features = [
            torch.cat([features_of(embed, [_as_bytes(image)]) for image in images])
            for images in (real, drawn)
        ]
        for group, chosen in groups.items():
            metrics[group]["fid"] = frechet_distance(features[0][chosen], features[1][chosen])
            mean, deviation = kernel_distance(
                features[0][chosen],
                features[1][chosen],
                self._config.kid_subsets,
                self._config.kid_subset_size,
            )
            metrics[group] |= {"kid": mean, "kid_deviation": deviation}

    def _write_sheets(
        self, drawn: list[Image.Image], verdicts: list[str] | None, groups: dict[str, list[int]]
    ) -> None:
        for group, chosen in groups.items():
            shown = chosen[:: -(-len(chosen) // MAX_SHOWN)]
            rows = [(self._text(i, verdicts), self._real[i], drawn[i]) for i in shown]
            content = encode_png(make_image_grid(rows, ("real", "drawn")))
            write_file(self._folder / f"sheet-{group}.png", content)

    def _text(self, index: int, verdicts: list[str] | None) -> str:
        item = self.items[index]
        wrong = verdicts is not None and verdicts[index] != item.key
        return item.captions[0] + (f" (judged {verdicts[index]})" if wrong and verdicts else "")


def _for_judge(images: Sequence[Image.Image]) -> Tensor:
    """Images as the judge takes them: [N, 3, 64, 64] in [0, 1]."""
    return preprocess_images(images, IMAGE_SIZE, IMAGE_SIZE) / 2 + 0.5


def _as_bytes(image: Image.Image) -> Tensor:
    """An image as uint8 [3, H, W]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
