"""Sample sheets: images drawn and captions written by a checkpoint, beside the real pairs."""

from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from megafusion.checkpoint.folder import step_of
from megafusion.checkpoint.reader import CheckpointWeights, fill_tensors
from megafusion.data.decode import decode, first_images
from megafusion.data.source import Source
from megafusion.generate.pipeline import TransfusionPipeline
from megafusion.images.grid import encode_png, make_image_grid
from megafusion.storage import write_file
from megafusion.train.build import Components, make_pipeline
from megafusion.train.config import RunConfig


@dataclass(frozen=True)
class SamplePairs:
    """Captions and their real images, evenly spaced over a source of pairs."""

    captions: list[str]
    images: list[Image.Image]


def sample_pairs(sources: dict[str, Source], pipeline: TransfusionPipeline, num_pairs: int) -> SamplePairs:
    """Pairs to draw and describe, of the first source that has any."""
    source = next(s for s in sources.values() if s.folder.manifest.kind == "pair")
    size = len(source.folder)
    chosen = [source.folder.read(size * i // num_pairs) for i in range(min(num_pairs, size))]
    return SamplePairs(
        captions=[document.metadata["caption"] for document in chosen],
        images=decode(first_images(chosen), pipeline.codec, pipeline.sizes),
    )


def show_samples(pipeline: TransfusionPipeline, pairs: SamplePairs, path: Path) -> tuple[Image.Image, str]:
    """Draw the captions, describe the images, write the sheet; returns it and the generated captions."""
    drawn = pipeline.draw(pairs.captions)
    described = pipeline.describe(pairs.images)
    sheet = make_image_grid(list(zip(pairs.captions, pairs.images, drawn, strict=True)), ("real", "drawn"))
    write_file(path, encode_png(sheet))
    lines = [f"- {true} -> {found}" for true, found in zip(pairs.captions, described, strict=True)]
    write_file(path.with_suffix(".txt"), "\n".join(lines) + "\n")
    return sheet, "\n".join(lines)


class Sampler:
    """A second copy of the model with a checkpoint's averaged weights, and the pairs to sample.

    It is in host memory until it draws, because training leaves no room on a device for a whole large model.
    """

    def __init__(self, config: RunConfig, components: Components, device: torch.device):
        self._config, self._components, self._device = config, components, device
        self._pipeline: TransfusionPipeline | None = None
        self._pairs: SamplePairs | None = None

    def pipeline(self, checkpoint: Path) -> TransfusionPipeline:
        """The pipeline with the averaged weights of a checkpoint."""
        if self._pipeline is None:
            self._pipeline = make_pipeline(self._config, self._components.tokenizer, self._components.codec)
        fill_tensors(CheckpointWeights(checkpoint, "ema"), self._pipeline.model.weights())
        return self._pipeline

    def show(self, checkpoint: Path) -> tuple[int, Image.Image, str]:
        """Write a sheet to the run folder; returns the checkpoint's step, the sheet, the captions."""
        pipeline = self.pipeline(checkpoint).to(self._device)
        self._pairs = self._pairs or sample_pairs(
            self._components.sources, pipeline, self._config.samples.num_pairs
        )
        step = step_of(checkpoint)
        return step, *show_samples(
            pipeline, self._pairs, self._config.out / "samples" / f"step-{step:08d}.png"
        )
