"""Sample sheets: images drawn and captions written by a checkpoint, beside the real pairs."""

from functools import cached_property
from pathlib import Path

import torch
from PIL import Image

from megafusion.checkpoint.folder import step_of
from megafusion.checkpoint.lora import open_weights
from megafusion.checkpoint.reader import fill_tensors
from megafusion.data.images import decode, first_images
from megafusion.generate.pipeline import TransfusionPipeline
from megafusion.images.grid import encode_png, make_image_grid
from megafusion.storage import write_file
from megafusion.train.build import Components, make_pipeline
from megafusion.train.config import RunConfig


class Sampler:
    """A second copy of the model with a checkpoint's averaged weights, and the pairs to sample.

    It is in host memory until it draws, because training leaves no room on a device for a whole large model.
    """

    def __init__(self, config: RunConfig, components: Components, device: torch.device):
        self._config, self._components, self._device = config, components, device

    @cached_property
    def _pipeline(self) -> TransfusionPipeline:
        return make_pipeline(self._config, self._components.tokenizer, self._components.codec)

    @cached_property
    def _pairs(self) -> tuple[list[str], list[Image.Image]]:
        """Captions and their real images, evenly spaced over the first source of pairs."""
        sources, num_pairs = self._components.sources.values(), self._config.samples.num_pairs
        source = next(s for s in sources if s.folder.manifest.kind == "pair")
        size = len(source.folder)
        chosen = [source.folder.read(size * i // num_pairs) for i in range(min(num_pairs, size))]
        images = decode(first_images(chosen), self._pipeline.codec, self._pipeline.sizes)
        return [self._cut(document.metadata["caption"]) for document in chosen], images

    def _cut(self, caption: str) -> str:
        """A caption, cut where a row has room for an image (and bos, boi, eoi and eos) behind it."""
        room = self._config.data.sequence_length - max(self._config.model.patches) - 4
        tokenizer = self._components.tokenizer
        if len(ids := tokenizer.encode(caption)) > room:
            caption = tokenizer.decode(ids[:room])
            while len(tokenizer.encode(caption)) > room:  # a cut word may take more tokens than it did
                caption = caption[:-1]
        return caption

    def load(self, checkpoint: Path) -> TransfusionPipeline:
        """The pipeline with the averaged weights of a checkpoint."""
        weights = open_weights(checkpoint, "ema", self._config.train.lora)
        fill_tensors(weights, self._pipeline.model.weights())
        return self._pipeline

    def show(self, checkpoint: Path) -> tuple[int, Image.Image, str]:
        """Draw, describe and write the sheet; returns the checkpoint's step, the sheet, the captions."""
        pipeline = self.load(checkpoint).to(self._device)
        captions, images = self._pairs
        drawn, described = pipeline.draw(captions), pipeline.describe(images)
        sheet = make_image_grid(list(zip(captions, images, drawn, strict=True)), ("real", "drawn"))
        lines = "\n".join(f"- {true} -> {found}" for true, found in zip(captions, described, strict=True))
        step = step_of(checkpoint)
        path = self._config.out / "samples" / f"step-{step:08d}.png"
        write_file(path, encode_png(sheet))
        write_file(path.with_suffix(".txt"), lines + "\n")
        return step, sheet, lines
