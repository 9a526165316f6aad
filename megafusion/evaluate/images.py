"""The images suite: what the model draws from captions, against the real images of these captions."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from megafusion.errors import UserError
from megafusion.evaluate.annotations import AnnotatedImage, read_annotations
from megafusion.evaluate.classifier import IMAGE_SIZE, ImageClassifier
from megafusion.evaluate.clip import Clip
from megafusion.evaluate.config import EvaluateConfig
from megafusion.evaluate.distances import features_of, frechet_distance, kernel_distance
from megafusion.evaluate.groups import annotated_images, by_group, draw
from megafusion.evaluate.inception import load_inception
from megafusion.evaluate.judge import prove, split_key
from megafusion.evaluate.suite import Metrics
from megafusion.generate.pipeline import TransfusionPipeline
from megafusion.images.grid import encode_png, make_image_grid
from megafusion.images.processor import preprocess_images, resize_and_crop
from megafusion.images.reader import load_image
from megafusion.storage import write_file

MAX_SHOWN = 48
SEEN = "seen"
"""Group of the images that the model was trained on, where there is one."""


class Images:
    """FID, KID and CLIP score with the user's weights; the judge's verdicts and Frechet distance.

    folder: where drawn images and sheets are written.
    """

    name = "images"

    def __init__(self, config: EvaluateConfig, folder: Path):
        self._config, self._folder = config, folder
        self.items: Sequence[AnnotatedImage]
        self.items, self.recipe = annotated_images(config)
        groups = by_group(self.items)
        if config.inception and (alone := [name for name, chosen in groups.items() if len(chosen) < 2]):
            raise UserError(f"inception: group {alone[0]!r} has one image; FID needs 2 or more of each group")
        self._judge, self.proof = self._open_judge()
        self._inception = load_inception(config.inception) if config.inception else None
        self._clip = Clip(config.clip) if config.clip else None

    def measure(
        self, pipeline: TransfusionPipeline, first: int, items: Sequence[AnnotatedImage]
    ) -> list[dict]:
        """Draw the first caption of each image; the record names the file."""
        captions = [item.captions[0] for item in items]
        names = draw(pipeline, self._config, first, captions, self._folder)
        return [{"image_id": item.id, "file": name} for item, name in zip(items, names, strict=True)]

    def summarize(self, records: list[dict], device: Any = "cpu") -> dict[str, Metrics]:
        """Metrics by group of the images, and sheets of them."""
        drawn = [self._folder / record["file"] for record in records]
        groups = by_group(self.items)
        metrics: dict[str, Metrics] = {group: {"images": len(chosen)} for group, chosen in groups.items()}
        verdicts = self._add_judged(drawn, metrics, groups) if self._judge else None
        if self._inception:
            self._add_distances(self._inception.to(device), drawn, metrics, groups)
        if self._clip:
            self._add_clip_score(self._clip, drawn, metrics, groups)
        for group, chosen in groups.items():
            shown = chosen[:: -(-len(chosen) // MAX_SHOWN)]
            rows = [
                (self._text(i, verdicts), load_image(self.items[i].path), load_image(drawn[i])) for i in shown
            ]
            content = encode_png(make_image_grid(rows, ("real", "drawn")))
            write_file(self._folder / f"sheet-{group}.png", content)
        return metrics

    def _open_judge(self) -> tuple[ImageClassifier | None, dict[str, float]]:
        path = self._config.judge
        if path is None:
            return None, {}
        assert self._config.annotations
        named = read_annotations(self._config.annotations, self._config.image_folder)
        self._seen = [image for image in named if image.group == SEEN]  # more than `max_items` of them
        if unnamed := [item.path for item in (*self.items, *self._seen) if not item.key]:
            raise UserError(f"judge: {self._config.annotations} has no `key` for {unnamed[0].name}; add them")
        judge = ImageClassifier.load(path)
        keys = [str(item.key) for item in self.items]
        return judge, prove(path, judge, torch.stack(list(_for_judge(self._paths))), keys)

    def _add_judged(
        self, drawn: list[Path], metrics: dict[str, Metrics], groups: dict[str, list[int]]
    ) -> list[str]:
        """Add the judge's figures; returns its verdict on each drawn image.

        Closed figures are of the key of all items that is nearest, where verdicts may be `other`.
        A drawn image is also compared with all images of the group `seen` in the annotation file, evaluated
        or not: nearest_seen_concept and _style are the shares that a copy of the nearest would have right.
        """
        judge = self._judge
        assert judge
        real, fake = (features_of(judge.embed, _for_judge(paths)) for paths in (self._paths, drawn))
        verdicts = [key for image in _for_judge(drawn) for key in judge.classify(image[None])]
        keys = sorted({str(item.key) for item in self.items})
        closed = [split_key(key) for key in judge.nearest(fake, keys)]
        wanted = [split_key(str(item.key)) for item in self.items]
        found = [split_key(verdict) for verdict in verdicts]
        copied: list[tuple[str, str]] = []
        if self._seen:
            seen = features_of(judge.embed, _for_judge([image.path for image in self._seen]))
            copied = [split_key(str(self._seen[index].key)) for index in (fake @ seen.T).argmax(-1).tolist()]
        for group, chosen in groups.items():
            figures = metrics[group]
            for part, name in enumerate(("concept", "style")):
                figures[f"{name}_accuracy"] = fmean(found[i][part] == wanted[i][part] for i in chosen)
                figures[f"closed_{name}_accuracy"] = fmean(closed[i][part] == wanted[i][part] for i in chosen)
                figures[f"{name}_chance"] = 1 / len({pair[part] for pair in wanted})
                if copied:
                    figures[f"nearest_seen_{name}"] = fmean(
                        copied[i][part] == wanted[i][part] for i in chosen
                    )
            figures["both_accuracy"] = fmean(found[i] == wanted[i] for i in chosen)
            figures["closed_both_accuracy"] = fmean(closed[i] == wanted[i] for i in chosen)
            if len(chosen) > 1:
                figures["judge_frechet_distance"] = frechet_distance(real[chosen], fake[chosen])
        return verdicts

    def _add_distances(
        self, network: nn.Module, drawn: list[Path], metrics: dict[str, Metrics], groups: dict[str, list[int]]
    ) -> None:
        """Add FID and KID: real images at the size of the drawn ones."""
        device = next(network.parameters()).device

        def embed(images: Iterator[Image.Image]) -> Tensor:
            return features_of(lambda batch_N3HW: network(batch_N3HW.to(device))[0], map(_as_bytes, images))

        fake = map(load_image, drawn)
        sizes = (load_image(path).size for path in drawn)
        real = (
            resize_and_crop(load_image(path), height, width)
            for path, (width, height) in zip(self._paths, sizes, strict=True)
        )
        real_ND, fake_ND = embed(real), embed(fake)
        for group, chosen in groups.items():
            pair = real_ND[chosen], fake_ND[chosen]
            metrics[group]["fid"] = frechet_distance(*pair)
            kid = kernel_distance(*pair, self._config.kid_subsets, self._config.kid_subset_size)
            metrics[group] |= {"kid": kid[0], "kid_deviation": kid[1]}

    def _add_clip_score(
        self, clip: Clip, drawn: list[Path], metrics: dict[str, Metrics], groups: dict[str, list[int]]
    ) -> None:
        """Add the mean CLIP score of drawn images with the captions that they were drawn from."""
        scores: list[float] = []
        for first in range(0, len(drawn), self._config.batch_size):
            chosen = range(first, min(first + self._config.batch_size, len(drawn)))
            texts = [self.items[i].captions[0] for i in chosen]
            scores += clip.scores([load_image(drawn[i]) for i in chosen], texts)
        for group, members in groups.items():
            metrics[group]["clip_score"] = fmean(scores[i] for i in members)

    @property
    def _paths(self) -> list[Path]:
        return [item.path for item in self.items]

    def _text(self, index: int, verdicts: list[str] | None) -> str:
        item = self.items[index]
        wrong = verdicts is not None and verdicts[index] != item.key
        return item.captions[0] + (f" (judged {verdicts[index]})" if wrong and verdicts else "")


def _for_judge(paths: Sequence[Path]) -> Iterator[Tensor]:
    """Images as the judge takes them: [3, 64, 64] in [0, 1]."""
    for path in paths:
        yield preprocess_images([load_image(path)], IMAGE_SIZE, IMAGE_SIZE)[0] / 2 + 0.5


def _as_bytes(image: Image.Image) -> Tensor:
    """An image as uint8 [3, H, W]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
