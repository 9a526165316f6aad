"""One call of the pipeline: rows decoded together until each has ended."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch
from PIL import Image

from megafusion.generate.decoder import Decoder, ProgressCallback
from megafusion.images.codec import ImageCodec
from megafusion.images.reader import convert_to_rgb
from megafusion.images.sizes import nearest_size
from megafusion.model.transfusion import Transfusion
from megafusion.objective.config import SamplingConfig
from megafusion.sequence.document import FlatDocument, ImageSegment, Segment, flatten
from megafusion.sequence.packing import SequenceShape, collate, pack_row
from megafusion.sequence.tokenizer import Tokenizer

Part = str | Image.Image


class Generation:
    """The rows of one call: their cache, next-token logits and outputs so far.

    max_images: images per output. size: index of the size of every drawn image; None lets the model choose
    by its begin-of-image (boi) token.
    """

    def __init__(
        self,
        model: Transfusion,
        tokenizer: Tokenizer,
        codec: ImageCodec,
        prompts: Sequence[Sequence[Part]],
        sampling: SamplingConfig,
        seed: int,
        max_images: int,
        size: int | None = None,
        progress: ProgressCallback | None = None,
    ):
        self.config, self.tokenizer, self.codec = model.config, tokenizer, codec
        self.decoder, self.sampling, self.size, self.progress = Decoder(model), sampling, size, progress
        self.device = model.tail.head.weight.device
        # One generator per row: its noise does not depend on the other rows of the batch.
        self.generators = [torch.Generator().manual_seed(seed + row) for row in range(len(prompts))]
        self.images_left = [max_images] * len(prompts)
        self.outputs: list[list[Part | int]] = [[] for _ in prompts]
        """By row: images, and token ids that are not decoded to text yet."""
        config = self.config
        self.boi_ids = [tokenizer.boi_of_size(index) for index in range(len(config.image_sizes))]
        documents = [self._document(prompt) for prompt in prompts]
        longest = max(len(document) for document in documents)
        room = max_images * (max(config.patches) + 2) + sampling.max_new_tokens + 1
        self.cache = self.decoder.new_cache(len(prompts), longest + room)
        shape = SequenceShape(
            length=longest,
            num_images=max(1, *(len(document.images) for document in documents)),
            patches=config.patches,
            latent_channels=config.latent_channels,
            sizes=config.latent_sizes,
        )
        batch = collate([pack_row([document], shape) for document in documents]).to(self.device)
        # A document ends in eos; a prompt does not.
        lengths = torch.tensor([len(document) - 1 for document in documents], device=self.device)
        self.logits = self.decoder.read_prompts(self.cache, batch, lengths)

    def run(self, begin: str) -> list[list[Part]]:
        """Decode until every row has ended or max_new_tokens is reached; begin as in the pipeline's call."""
        if begin == "image":
            chosen = self.logits[:, self.boi_ids].argmax(-1).tolist()
            self._draw(dict(enumerate(chosen if self.size is None else [self.size] * len(chosen))))
        if begin == "text":
            self.logits[:, self.tokenizer.eos] = -torch.inf
        active = list(range(len(self.outputs)))
        for _ in range(self.sampling.max_new_tokens):
            if active:
                active = self._step(active)
        return [self._to_parts(output) for output in self.outputs]

    def _step(self, active: list[int]) -> list[int]:
        """Decode one token greedily for each active row, with an image after a boi; rows still active."""
        logits = self.logits[active].clone()
        logits[:, self.tokenizer.eoi] = -torch.inf
        logits[:, self.tokenizer.num_ids(len(self.boi_ids)) :] = -torch.inf  # rows of a padded vocabulary
        without_images = [i for i, row in enumerate(active) if self.images_left[row] <= 0]
        if self.size is not None:  # a boi of any size counts as one of the requested size
            logits[:, self.boi_ids[self.size]] = logits[:, self.boi_ids].amax(-1)
        for size, token in enumerate(self.boi_ids):
            logits[without_images if self.size in (None, size) else slice(None), token] = -torch.inf
        tokens = dict(zip(active, logits.argmax(-1).tolist(), strict=True))
        images = {row: self.boi_ids.index(t) for row, t in tokens.items() if t in self.boi_ids}
        texts = {row: t for row, t in tokens.items() if row not in images and t != self.tokenizer.eos}
        for row, token in texts.items():
            self.outputs[row].append(token)
        if texts:
            self._append(list(texts), list(texts.values()))
        if images:
            self._draw(images)
        return sorted([*texts, *images])

    def _draw(self, sizes: dict[int, int]) -> None:
        """Append boi, an image and eoi to some rows; sizes: the index of its size, by row."""
        for size in sorted(set(sizes.values())):
            self._draw_at([row for row in sizes if sizes[row] == size], size)

    def _draw_at(self, rows: list[int], size: int) -> None:
        index = torch.tensor(rows, device=self.device)
        self._append(rows, [self.boi_ids[size]] * len(rows))
        unconditional = self.decoder.new_cache(1, self.cache.capacity)
        for token in (self.tokenizer.bos, self.boi_ids[size]):
            self.decoder.read_tokens(unconditional, torch.tensor([token], device=self.device))
        cache = self.cache.select(index)
        shape = (self.config.latent_channels, *self.config.latent_sizes[size])
        noise = torch.stack([torch.randn(shape, generator=self.generators[row]) for row in rows])
        latents = self.decoder.draw(
            cache,
            unconditional.select(torch.zeros_like(index)),
            noise.to(self.device),
            self.sampling,
            self.progress,
        )
        self.cache.assign(index, cache)
        self._append(rows, [self.tokenizer.eoi] * len(rows))
        for row, image in zip(rows, self.codec.decode_images(latents), strict=True):
            self.outputs[row].append(image)
            self.images_left[row] -= 1

    def _append(self, rows: list[int], tokens: list[int]) -> None:
        """Append one token to each of some rows, and update their logits."""
        index = torch.tensor(rows, device=self.device)
        all_rows = len(rows) == len(self.outputs)
        cache = self.cache if all_rows else self.cache.select(index)
        self.logits[index] = self.decoder.read_tokens(cache, torch.tensor(tokens, device=self.device))
        if not all_rows:
            self.cache.assign(index, cache)

    def _document(self, prompt: Sequence[Part]) -> FlatDocument:
        """A prompt as a flat document, its images without noise."""
        segments = []
        for part in prompt:
            if isinstance(part, str):
                segments.append(Segment("tokens", np.array(self.tokenizer.encode(part), np.int64)))
            else:
                image, sizes = convert_to_rgb(part), self.config.image_sizes
                size = nearest_size(image.height, image.width, sizes)
                latents = self.codec.encode_images([image], sizes[size])[0].cpu().numpy()
                segments.append(ImageSegment(size=size, latents=latents, noise=np.zeros_like(latents)))
        return flatten(segments, self.tokenizer, self.config.patches)

    def _to_parts(self, output: list[Part | int]) -> list[Part]:
        """Decode each run of token ids to one text."""
        parts: list[Part] = []
        for is_token, run in groupby(output, lambda part: isinstance(part, int)):
            found: list[Any] = list(run)
            parts += [self.tokenizer.decode(found)] if is_token else found
        return parts
