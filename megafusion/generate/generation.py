"""One call of the pipeline: rows that are read, written to and drawn into until each has ended."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from megafusion.generate.decoder import Decoder, Report
from megafusion.generate.sampling import SamplingConfig
from megafusion.sequence.document import FlatDocument, NoisedImage, flatten
from megafusion.sequence.packing import RowShape, collate, pack_row

if TYPE_CHECKING:
    from megafusion.generate.pipeline import TransfusionPipeline

Part = str | Image.Image


class Generation:
    """One call's rows: their cache, what they have said, who is still speaking."""

    def __init__(
        self,
        pipeline: "TransfusionPipeline",
        prompts: Sequence[Sequence[Part]],
        sampling: SamplingConfig,
        seed: int,
        max_images: int,
        report: Report | None,
    ):
        self.pipeline, self.decoder, self.sampling = pipeline, Decoder(pipeline.model), sampling
        self.tokenizer, self.report, self.device = pipeline.tokenizer, report, pipeline.device
        # A generator a row: what one row draws does not depend on the others of its batch.
        self.generators = [torch.Generator().manual_seed(seed + row) for row in range(len(prompts))]
        self.images_left = [max_images] * len(prompts)
        self.answers: list[list[Part | int]] = [[] for _ in prompts]
        num_patches = pipeline.config.model.num_patches
        documents = [self._document(prompt) for prompt in prompts]
        longest = max(len(document) for document in documents)
        room = max_images * (num_patches + 2) + sampling.max_new_tokens + 1
        self.cache = self.decoder.new_cache(len(prompts), longest + room)
        shape = RowShape(
            length=longest,
            num_images=max(1, *(len(document.images) for document in documents)),
            num_patches=num_patches,
            latent_shape=pipeline.config.model.latent_shape,
        )
        batch = collate([pack_row([document], shape) for document in documents]).to(self.device)
        # A document ends in eos, which a prompt does not have.
        lengths = torch.tensor([len(document) - 1 for document in documents], device=self.device)
        self.logits = self.decoder.read_prompts(self.cache, batch, lengths)

    def run(self, begin: str) -> list[list[Part]]:
        """Write and draw until every row has ended or the budget is spent."""
        if begin == "image":
            self._draw(list(range(len(self.answers))))
        if begin == "text":
            self.logits[:, self.tokenizer.eos] = -torch.inf
        budget = self.sampling.max_new_tokens
        speaking = list(range(len(self.answers)))
        while speaking and budget:
            speaking = self._write(speaking)
            budget -= 1
        return [self._finish(answer) for answer in self.answers]

    def _write(self, speaking: list[int]) -> list[int]:
        """Choose and read one token for each speaking row; returns those that go on."""
        logits = self.logits[speaking].clone()
        logits[:, self.tokenizer.eoi] = -torch.inf
        silent = [i for i, row in enumerate(speaking) if self.images_left[row] <= 0]
        logits[silent, self.tokenizer.boi] = -torch.inf
        tokens = logits.argmax(-1).tolist()
        drawing = [row for row, t in zip(speaking, tokens, strict=True) if t == self.tokenizer.boi]
        writing = {
            row: t
            for row, t in zip(speaking, tokens, strict=True)
            if t not in (self.tokenizer.boi, self.tokenizer.eos)
        }
        for row, token in writing.items():
            self.answers[row].append(token)
        if writing:
            self._read(list(writing), list(writing.values()))
        if drawing:
            self._draw(drawing)
        return sorted([*writing, *drawing])

    def _draw(self, rows: list[int]) -> None:
        """Draw an image in some rows, between boi and eoi."""
        index = torch.tensor(rows, device=self.device)
        self._read(rows, [self.tokenizer.boi] * len(rows))
        unconditional = self.decoder.new_cache(1, self.cache.capacity)
        for token in (self.tokenizer.bos, self.tokenizer.boi):
            self.decoder.read_tokens(unconditional, torch.tensor([token], device=self.device))
        chosen = self.cache.select(index)
        shape = self.pipeline.config.model.latent_shape
        noise = torch.stack([torch.randn(shape, generator=self.generators[row]) for row in rows])
        latents = self.decoder.draw(
            chosen,
            unconditional.select(torch.zeros_like(index)),
            noise.to(self.device),
            self.sampling,
            self.report,
        )
        self.cache.assign(index, chosen)
        self._read(rows, [self.tokenizer.eoi] * len(rows))
        for row, picture in zip(rows, self.pipeline.pictures(latents), strict=True):
            self.answers[row].append(picture)
            self.images_left[row] -= 1

    def _read(self, rows: list[int], tokens: list[int]) -> None:
        index = torch.tensor(rows, device=self.device)
        whole = len(rows) == len(self.answers)
        chosen = self.cache if whole else self.cache.select(index)
        self.logits[index] = self.decoder.read_tokens(chosen, torch.tensor(tokens, device=self.device))
        if not whole:
            self.cache.assign(index, chosen)

    def _document(self, prompt: Sequence[Part]) -> FlatDocument:
        """A prompt as a flat document; its pictures are clean."""
        segments = []
        for part in prompt:
            if isinstance(part, str):
                segments.append(np.array(self.tokenizer.encode(part), np.int64))
            else:
                latents = self.pipeline.latents([part])[0].cpu().numpy()
                segments.append(NoisedImage(latents, np.zeros_like(latents), timestep=0))
        return flatten(segments, self.tokenizer, self.pipeline.config.model.num_patches)

    def _finish(self, answer: list[Part | int]) -> list[Part]:
        """Runs of token ids become texts."""
        parts: list[Part] = []
        pending: list[int] = []
        for piece in [*answer, None]:
            if isinstance(piece, int):
                pending.append(piece)
                continue
            if pending:
                parts.append(self.tokenizer.decode(pending))
                pending = []
            if piece is not None:
                parts.append(piece)
        return parts
