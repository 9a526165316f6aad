"""The reconstruction suite: images through the model's autoencoder and back, the ceiling of its drawing."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megafusion.evaluate.annotations import AnnotatedImage
from megafusion.evaluate.config import EvaluateConfig
from megafusion.evaluate.groups import annotated_images, by_group
from megafusion.evaluate.suite import Metrics
from megafusion.generate.arguments import load_image
from megafusion.generate.pipeline import TransfusionPipeline
from megafusion.images.codec import ImageCodec
from megafusion.images.grid import encode_png, make_image_grid
from megafusion.images.processor import postprocess_images, preprocess_images
from megafusion.images.sizes import nearest_size
from megafusion.storage import write_file

MAX_SHOWN = 48


class Reconstruction:
    """PSNR and mean absolute error of decoded mean latents. folder: where decoded images are written."""

    name = "reconstruction"

    def __init__(self, config: EvaluateConfig, folder: Path):
        self.items: Sequence[AnnotatedImage]
        self.items, self.recipe = annotated_images(config, self.name)
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


@torch.no_grad()
def reconstruct(codec: ImageCodec, pixels_N3HW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of pixels in [-1, 1]: float64 mean squared and absolute error [N] on pixels in [0, 1]; decoded."""
    device = next(codec.model.parameters()).device
    decoded = codec.reconstruct(pixels_N3HW.to(device)).float().cpu()
    difference = (decoded - pixels_N3HW).double() / 2
    return difference.square().mean((1, 2, 3)), difference.abs().mean((1, 2, 3)), decoded


def reconstruction_metrics(squared_N: Tensor, absolute_N: Tensor) -> dict[str, float]:
    """psnr: mean over images in dB; psnr_of_mean: of the mean squared error; l1: mean absolute difference."""
    squared_N = squared_N.clamp(min=1e-10)
    return {
        "psnr": float(-10 * squared_N.log10().mean()),
        "psnr_of_mean": float(-10 * squared_N.mean().log10()),
        "l1": float(absolute_N.mean()),
    }
