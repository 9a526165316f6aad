"""Sample sheets: images drawn and captions written by a checkpoint, beside the real pairs."""

from functools import cached_property
from itertools import pairwise
from pathlib import Path

import torch
from PIL import Image

from megafusion.checkpoint.folder import step_of, training_flops
from megafusion.checkpoint.lora import open_weights
from megafusion.checkpoint.reader import fill_tensors
from megafusion.data.document_format import BadDocument
from megafusion.data.images import decode, first_images
from megafusion.data.source import Source
from megafusion.generate.pipeline import TransfusionPipeline
from megafusion.images.grid import encode_png, make_image_grid
from megafusion.images.reader import BadImage
from megafusion.storage import write_file
from megafusion.train.build import Components, make_pipeline
from megafusion.train.config import RunConfig


class SampleSheets:
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
        """Captions and their real images, evenly spaced over the first source of pairs.

        In place of a bad document, where data.on_error skips it, the next one.
        """
        sources = self._components.sources.values()
        source = next(s for s in sources if s.folder.manifest.kind == "pair")
        size = len(source.folder)
        num_pairs = min(self._config.samples.num_pairs, size)
        bounds = [size * number // num_pairs for number in range(num_pairs + 1)]
        found = [self._first_pair(source, range(*span)) for span in pairwise(bounds)]
        pairs = [pair for pair in found if pair]
        return [self._cut(caption) for caption, _ in pairs], [image for _, image in pairs]

    def _first_pair(self, source: Source, documents: range) -> tuple[str, Image.Image] | None:
        """The first good pair of some documents. Raises BadDocument where data.on_error does not skip it."""
        for index in documents:
            try:
                return self._read_pair(source, index)
            except BadDocument:
                if self._config.data.on_error == "fail":
                    raise
        return None

    def _read_pair(self, source: Source, index: int) -> tuple[str, Image.Image]:
        """Caption and image of a document. Raises BadDocument."""
        where = f"{source.folder.folder}, document {index}"
        document = source.folder.read(index)
        source.check(document, where)
        if not isinstance(caption := document.metadata.get("caption"), str):
            raise BadDocument(where, "no caption in its metadata")
        try:
            (image,) = decode(first_images([document]), self._pipeline.codec, self._pipeline.sizes)
        except BadImage as error:
            raise BadDocument(where, str(error)) from error
        return caption, image

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
        update = {"training_flops": training_flops(checkpoint)}
        self._pipeline.config = self._pipeline.config.model_copy(update=update)
        return self._pipeline

    def show(self, checkpoint: Path) -> tuple[int, Image.Image, str]:
        """Draw, describe and write the sheet; returns the checkpoint's step, the sheet, the captions."""
        pipeline = self.load(checkpoint).to(self._device)
        try:
            captions, images = self._pairs
            drawn, described = pipeline.draw(captions), pipeline.describe(images)
        finally:
            pipeline.to("cpu")
        sheet = make_image_grid(list(zip(captions, images, drawn, strict=True)), ("real", "drawn"))
        lines = "\n".join(f"- {true} -> {found}" for true, found in zip(captions, described, strict=True))
        step = step_of(checkpoint)
        path = self._config.out / "samples" / f"step-{step:08d}.png"
        write_file(path, encode_png(sheet))
        write_file(path.with_suffix(".txt"), lines + "\n")
        return step, sheet, lines
