"""The reconstruction suite: images through the model's autoencoder and back, the ceiling of its drawing."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megafusion.evaluate.annotations import AnnotatedImage
from megafusion.evaluate.config import EvaluateConfig
from megafusion.evaluate.groups import annotated_images, by_group
from megafusion.evaluate.suite import Metrics
from megafusion.generate.pipeline import TransfusionPipeline
from megafusion.images.grid import encode_png, make_image_grid
from megafusion.images.processor import postprocess_images, preprocess_images
from megafusion.images.reader import load_image
from megafusion.images.reconstruction import reconstruct, reconstruction_metrics
from megafusion.images.sizes import nearest_size
from megafusion.storage import write_file

MAX_SHOWN = 48


class Reconstruction:
    """PSNR and mean absolute error of decoded mean latents. folder: where decoded images are written."""

    name = "reconstruction"

    def __init__(self, config: EvaluateConfig, folder: Path):
        self.items: Sequence[AnnotatedImage]
        self.items, self.recipe = annotated_images(config)
        self._folder = folder

    def measure(
        self, pipeline: TransfusionPipeline, first: int, items: Sequence[AnnotatedImage]
    ) -> list[dict]:
        """Squared and absolute error of each image, at the size of the model nearest to its own."""
        records = []
        for number, item in enumerate(items, first):
            image = load_image(item.path)
            size = pipeline.sizes[nearest_size(image.height, image.width, pipeline.sizes)]
            pixels = preprocess_images([image], *size)
            squared, absolute, decoded = reconstruct(pipeline.codec, pixels)
            name = f"decoded/{number:06d}.png"
            write_file(self._folder / name, encode_png(postprocess_images(decoded)[0]))
            errors = {"squared": squared.item(), "absolute": absolute.item()}
            records.append({"image_id": item.id, "file": name} | errors)
        return records

    def summarize(self, records: list[dict], device: Any = None) -> dict[str, Metrics]:
        """Metrics by group, and a sheet of each."""
        squared, absolute = (
            torch.tensor([r[key] for r in records]).double() for key in ("squared", "absolute")
        )
        metrics: dict[str, Metrics] = {}
        for group, chosen in by_group(self.items).items():
            metrics[group] = {"images": len(chosen)} | reconstruction_metrics(
                squared[chosen], absolute[chosen]
            )
            rows = [
                (
                    self.items[i].captions[0],
                    load_image(self.items[i].path),
                    load_image(self._folder / records[i]["file"]),
                )
                for i in chosen[:: -(-len(chosen) // MAX_SHOWN)]
            ]
            content = encode_png(make_image_grid(rows, ("real", "decoded")))
            write_file(self._folder / f"sheet-{group}.png", content)
        return metrics
