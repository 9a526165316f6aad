"""A sheet of what the model draws and writes at some step, beside the real pairs."""

from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from megafusion.checkpoint.folder import step_of
from megafusion.checkpoint.reader import load_full_tensors
from megafusion.data.decode import decode, first_images
from megafusion.data.source import Source
from megafusion.generate.pipeline import TransfusionPipeline
from megafusion.images.grid import encode_png, make_image_grid
from megafusion.storage import write_file
from megafusion.train.build import Components, make_pipeline
from megafusion.train.config import RunConfig


@dataclass(frozen=True)
class SamplePairs:
    """Captions and their real pictures, taken evenly from a source of pairs."""

    captions: list[str]
    pictures: list[Image.Image]


def sample_pairs(
    sources: dict[str, Source], pipeline: TransfusionPipeline, num_pairs: int
) -> SamplePairs | None:
    """Pairs to draw and describe; None where no source has any."""
    source = next((s for s in sources.values() if s.folder.manifest.kind == "pair"), None)
    if source is None:
        return None
    size = len(source.folder)
    chosen = [source.read(size * i // num_pairs) for i in range(min(num_pairs, size))]
    return SamplePairs(
        captions=[document.metadata["caption"] for document in chosen],
        pictures=decode(first_images(chosen), pipeline.codec, pipeline.sizes),
    )


def show_samples(pipeline: TransfusionPipeline, pairs: SamplePairs, path: Path) -> tuple[Image.Image, str]:
    """Draw the captions, describe the pictures, write the sheet; returns it and the captions written."""
    drawn = pipeline.draw(pairs.captions)
    described = pipeline.describe(pairs.pictures)
    sheet = make_image_grid(list(zip(pairs.captions, pairs.pictures, drawn, strict=True)), ("real", "drawn"))
    write_file(path, encode_png(sheet))
    lines = [f"- {true} -> {said}" for true, said in zip(pairs.captions, described, strict=True)]
    write_file(path.with_suffix(".txt"), "\n".join(lines) + "\n")
    return sheet, "\n".join(lines)


class Sampler:
    """A second copy of the model that carries a checkpoint's averaged weights, and the pairs to try it on.

    It is in host memory until it draws: training leaves no room on a device for a whole large model.
    """

    def __init__(self, config: RunConfig, parts: Components, device: torch.device):
        self._config, self._parts, self._device = config, parts, device
        self._pipeline: TransfusionPipeline | None = None
        self._pairs: SamplePairs | None = None

    def pipeline(self, checkpoint: Path) -> TransfusionPipeline:
        """The pipeline with the averaged weights of a checkpoint."""
        if self._pipeline is None:
            self._pipeline = make_pipeline(self._config, self._parts.tokenizer, self._parts.codec)
        shapes = {name: p.shape for name, p in self._pipeline.model.named_parameters()}
        self._pipeline.model.load_state_dict(load_full_tensors(checkpoint, shapes, "ema", verify=False))
        return self._pipeline

    def show(self, checkpoint: Path) -> tuple[int, Image.Image, str]:
        """A checkpoint's step, a sheet drawn, the captions written, both also in the run folder."""
        pipeline = self.pipeline(checkpoint).to(self._device)
        self._pairs = self._pairs or sample_pairs(
            self._parts.sources, pipeline, self._config.samples.num_pairs
        )
        step = step_of(checkpoint)
        return step, *show_samples(
            pipeline, self._pairs, self._config.out / "samples" / f"step-{step:08d}.png"
        )
