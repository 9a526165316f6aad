"""Packed rows without a data set: documents of random tokens and latents, laid out as real ones."""

from pathlib import Path
from typing import Literal

import numpy as np

from megafusion.sequence.document import FlatDocument, ImageSegment, Segment, flatten
from megafusion.sequence.packing import PackedBatch, pack_row
from megafusion.sequence.tokenizer import Tokenizer
from megafusion.train.config import RunConfig

Kind = Literal["mixed", "text", "pairs"]


class RandomTokens(Tokenizer):
    """The ids of a vocabulary, which stands for no text."""

    def __init__(self, vocab_size: int, num_sizes: int):
        super().__init__(Path("random"), "", vocab_size - num_sizes - 1, bos=1, eos=2)


class SyntheticRows:
    """Rows of captions with images, of texts (lengths log-normal, mean about 1,100), or half of each."""

    def __init__(self, config: RunConfig, kind: Kind, seed: int = 0):
        self._config, self._kind = config, kind
        self._shape, self._random = config.sequence_shape, np.random.default_rng(seed)
        self._process = config.objective.noise_process.build()
        self._tokenizer = RandomTokens(config.model.vocab_size, len(config.model.image_sizes))

    def next(self) -> PackedBatch:
        """One packed row, filled but for a few positions."""
        documents: list[FlatDocument] = []
        length = num_images = 0
        while (room := self._shape.length - length) >= 3:
            wants_image = self._kind == "pairs" or (
                self._kind == "mixed" and length < self._shape.length // 2
            )
            document = self._pair(room) if wants_image and num_images < self._shape.num_images else None
            if document is None and self._kind == "pairs" and documents:
                break
            document = document or self._text(room)
            documents.append(document)
            length += document.positions_in_row(0, len(document))
            num_images += len(document.images)
        return pack_row(documents, self._shape)

    def _pair(self, room: int) -> FlatDocument | None:
        """A caption of 8 to 60 tokens and an image; None if the room is too small for one."""
        size = int(self._random.integers(len(self._shape.patches)))
        room -= self._shape.patches[size] * (2 if self._shape.clean_context else 1) + 4
        if room < 8:
            return None
        shape = (self._shape.latent_channels, *self._shape.sizes[size])
        latents, noise = self._random.standard_normal((2, *shape), np.float32)
        t = self._process.sample_t(self._random, 1.0)
        image = ImageSegment(size=size, latents=latents, noise=noise, t=t)
        return self._flatten([self._tokens(int(self._random.integers(8, min(60, room) + 1))), image])

    def _text(self, room: int) -> FlatDocument:
        return self._flatten([self._tokens(min(room - 2, int(self._random.lognormal(6.6, 0.9)) + 1))])

    def _tokens(self, length: int) -> Segment:
        return Segment("tokens", self._random.integers(3, self._tokenizer.boi, length))

    def _flatten(self, segments: list[Segment]) -> FlatDocument:
        shape = self._shape
        return flatten(segments, self._tokenizer, shape.patches, shape.causal_images, shape.clean_context)
