"""One call of the pipeline: rows that are read, written to and drawn into until each has ended."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from megafusion.generate.decoder import Decoder, Report
from megafusion.objective.config import SamplingConfig
from megafusion.sequence.document import FlatDocument, ImageSegment, Segment, flatten
from megafusion.sequence.packing import SequenceShape, collate, pack_row

if TYPE_CHECKING:
    from megafusion.generate.pipeline import TransfusionPipeline

Part = str | Image.Image


class Generation:
    """One call's rows: their cache, what they have said, who is still speaking.

    size: index of the size that every drawn picture is to have; None: the model chooses, by its boi.
    """

    def __init__(
        self,
        pipeline: "TransfusionPipeline",
        prompts: Sequence[Sequence[Part]],
        sampling: SamplingConfig,
        seed: int,
        max_images: int,
        report: Report | None,
        size: int | None = None,
    ):
        self.pipeline, self.decoder, self.sampling = pipeline, Decoder(pipeline.model), sampling
        self.tokenizer, self.report, self.device = pipeline.tokenizer, report, pipeline.device
        # A generator a row: what one row draws does not depend on the others of its batch.
        self.generators = [torch.Generator().manual_seed(seed + row) for row in range(len(prompts))]
        self.images_left = [max_images] * len(prompts)
        self.answers: list[list[Part | int]] = [[] for _ in prompts]
        model = pipeline.config.model
        self.begins = [self.tokenizer.boi_of_size(number) for number in range(len(model.image_sizes))]
        self.size = size
        documents = [self._document(prompt) for prompt in prompts]
        longest = max(len(document) for document in documents)
        room = max_images * (max(model.patches) + 2) + sampling.max_new_tokens + 1
        self.cache = self.decoder.new_cache(len(prompts), longest + room)
        shape = SequenceShape(
            length=longest,
            num_images=max(1, *(len(document.images) for document in documents)),
            patches=model.patches,
            latent_channels=model.latent_channels,
            sizes=model.latent_sizes,
        )
        batch = collate([pack_row([document], shape) for document in documents]).to(self.device)
        # A document ends in eos, which a prompt does not have.
        lengths = torch.tensor([len(document) - 1 for document in documents], device=self.device)
        self.logits = self.decoder.read_prompts(self.cache, batch, lengths)

    def run(self, begin: str) -> list[list[Part]]:
        """Write and draw until every row has ended or the budget is spent."""
        if begin == "image":
            begins = self.logits[:, self.begins].argmax(-1).tolist()
            sizes = begins if self.size is None else [self.size] * len(begins)
            self._draw(dict(enumerate(sizes)))
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
        if self.size is not None:  # the wish for a picture is one, whatever size it is for
            logits[:, self.begins[self.size]] = logits[:, self.begins].amax(-1)
        for size, token in enumerate(self.begins):
            logits[silent if self.size in (None, size) else slice(None), token] = -torch.inf
        tokens = dict(zip(speaking, logits.argmax(-1).tolist(), strict=True))
        drawing = {row: self.begins.index(t) for row, t in tokens.items() if t in self.begins}
        writing = {row: t for row, t in tokens.items() if row not in drawing and t != self.tokenizer.eos}
        for row, token in writing.items():
            self.answers[row].append(token)
        if writing:
            self._read(list(writing), list(writing.values()))
        if drawing:
            self._draw(drawing)
        return sorted([*writing, *drawing])

    def _draw(self, sizes: dict[int, int]) -> None:
        """Draw an image in some rows, each of its size, between boi and eoi."""
        for size in sorted(set(sizes.values())):
            self._draw_together([row for row in sizes if sizes[row] == size], size)

    def _draw_together(self, rows: list[int], size: int) -> None:
        index = torch.tensor(rows, device=self.device)
        self._read(rows, [self.begins[size]] * len(rows))
        unconditional = self.decoder.new_cache(1, self.cache.capacity)
        for token in (self.tokenizer.bos, self.begins[size]):
            self.decoder.read_tokens(unconditional, torch.tensor([token], device=self.device))
        chosen = self.cache.select(index)
        model = self.pipeline.config.model
        shape = (model.latent_channels, *model.latent_sizes[size])
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
                segments.append(Segment("tokens", np.array(self.tokenizer.encode(part), np.int64)))
            else:
                size = self.pipeline.size_of(part)
                latents = self.pipeline.latents([part], size)[0].cpu().numpy()
                segments.append(ImageSegment(size=size, latents=latents, noise=np.zeros_like(latents)))
        return flatten(segments, self.tokenizer, self.pipeline.config.model.patches)

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
