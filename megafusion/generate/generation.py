"""Rows that are decoded together until each has ended, as a stream of events."""

from collections.abc import Generator, Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from megafusion.errors import UserError
from megafusion.generate.cache import KVCache
from megafusion.generate.codes import sample_codes
from megafusion.generate.decoder import Decoder, DenoisingStep, Guide
from megafusion.generate.events import Event, ImageDone, ImagePreview, ImageStep, RowDone, TextDelta
from megafusion.generate.next_tokens import NextTokens
from megafusion.generate.row import Part, Request, Row, count_positions, read_image, text_segments
from megafusion.generate.text import TextStream
from megafusion.images.codec import ImageCodec
from megafusion.model.config import ModelConfig
from megafusion.model.transfusion import Transfusion
from megafusion.sequence.document import FlatDocument, Segment, flatten
from megafusion.sequence.packing import SequenceShape, collate, pack_row
from megafusion.sequence.tokenizer import Tokenizer

UNKNOWN_LENGTH = 1_000_000
"""Positions of a row where the length in training is not known."""
FIRST_CAPACITY = 512
"""Positions beyond the prompt that the cache has room for at first."""
TEXT_KEYS = {"max_new_tokens", "stop", "negative_prompt"} | {
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
}
"""Of SamplingConfig: rows that differ in others are not denoised together."""


class Generation:
    """The rows of one call: their cache, next-token logits and outputs so far. Iterate for the events.

    A row's answer does not depend on the others. sequence_length: of the rows in training, where every row
    ends. streams_text: false where nobody reads the text before a row's end.
    Raises UserError for a prompt that leaves no room for an answer.
    """

    def __init__(
        self,
        model: Transfusion,
        tokenizer: Tokenizer,
        codec: ImageCodec,
        requests: Sequence[Request],
        sequence_length: int | None = None,
        streams_text: bool = True,
    ):
        self.config, self.tokenizer, self.codec = model.config, tokenizer, codec
        self.decoder, self.streams_text, self.is_interrupted = Decoder(model), streams_text, False
        self.device = model.tail.head.weight.device
        config = self.config
        self.boi_ids = [tokenizer.boi_of_size(index) for index in range(len(config.image_sizes))]
        self.image_positions = max(config.patches) + 2
        self.limit = (sequence_length or UNKNOWN_LENGTH) - 1
        """Positions of a row before its eos."""
        self.next_tokens = NextTokens(tokenizer, self.boi_ids, self.limit - self.image_positions)
        for number, request in enumerate(requests):
            check_request(request, f"prompt {number}", tokenizer, config, sequence_length)
        self.rows = [self._row(number, request) for number, request in enumerate(requests)]
        documents = [self._flatten(row.segments) for row in self.rows]
        for row, document in zip(self.rows, documents, strict=True):
            row.num_prompt_tokens = len(document)
        longest = max(len(document) for document in documents)
        room = max(r.max_images * self.image_positions + r.sampling.max_new_tokens for r in requests)
        first = max(FIRST_CAPACITY, self.image_positions)
        self.cache = self.decoder.new_cache(len(requests), min(longest + min(room, first), self.limit) + 1)
        self.live = list(self.rows)
        """Rows that have not ended, in the order of the cache and of the logits."""
        # A document ends in eos; a prompt does not.
        lengths = torch.tensor([len(document) - 1 for document in documents], device=self.device)
        self.logits = self._prefill(self.cache, documents, lengths)

    @property
    def outputs(self) -> list[list[Any]]:
        """Of each row, its images and token ids so far."""
        return [row.output for row in self.rows]

    def cancel(self, row: int) -> None:
        """End a row before its next step; the images of its batch are denoised to their end."""
        self.rows[row].is_cancelled = True

    def interrupt(self) -> None:
        """End every row at its next step, with the images of the begin as far as they are denoised then."""
        self.is_interrupted = True

    def answers(self) -> list[list[Part]]:
        """Of each row, texts and images so far."""
        return [row.parts(self.tokenizer) for row in self.rows]

    def run(self) -> list[list[Part]]:
        """Decode until every row has ended."""
        for _ in self:
            pass
        return self.answers()

    def __iter__(self) -> Generator[Event]:
        """Decode step by step until every row has ended. Between two events nothing is computed."""
        begun = {i: row for i, row in enumerate(self.live) if row.request.begin == "image"}
        sizes = self.logits[:, self.boi_ids].argmax(-1).tolist()
        yield from self._draw(
            {i: sizes[i] if r.request.size is None else r.request.size for i, r in begun.items()}
        )
        while True:
            yield from self._end_rows()
            if not self.live:
                return
            yield from self._step()

    def _end_rows(self) -> Iterator[Event]:
        """End the rows that have reached a limit, a stop text or eos, or are cancelled."""
        lengths = self.cache.lengths.tolist()
        reasons = [self._reason(row, length) for row, length in zip(self.live, lengths, strict=True)]
        for row, reason in zip(self.live, reasons, strict=True):
            if reason:
                yield from self._flush(row)
                yield RowDone(row.number, reason)
        self._keep([index for index, reason in enumerate(reasons) if not reason])

    def _reason(self, row: Row, length: int) -> Any:
        if row.is_cancelled or self.is_interrupted:
            return "cancelled"
        if row.text.is_stopped:
            return "stop"
        return "length" if row.is_over or length >= self.limit else None

    def _keep(self, indices: list[int]) -> None:
        if len(indices) < len(self.live):
            index = torch.tensor(indices, device=self.device, dtype=torch.int64)
            self.cache, self.logits = self.cache.select(index), self.logits[index]
            self.live = [self.live[i] for i in indices]

    def _step(self) -> Iterator[Event]:
        """Decode one token for each live row, with an image after a boi."""
        lengths = self.cache.lengths.tolist()
        tokens = self.next_tokens.choose(self.live, self.logits, lengths)
        is_read = []
        for row, token, length in zip(self.live, tokens, lengths, strict=True):
            row.steps += 1
            is_text = token != self.tokenizer.eos and token not in self.boi_ids
            if is_text:
                row.add_token(token)
                row.is_full = length + 1 >= self.limit
                if (self.streams_text or row.request.sampling.stop) and (text := row.text.push(token)):
                    yield TextDelta(row.number, text)
            is_read.append(is_text and not row.is_over)
        if any(is_read):
            self._read(tokens, is_read)
        yield from self._draw({i: self.boi_ids.index(t) for i, t in enumerate(tokens) if t in self.boi_ids})
        ended = [row for row, token in zip(self.live, tokens, strict=True) if token == self.tokenizer.eos]
        for row in ended:
            yield from self._flush(row)
            yield RowDone(row.number, "eos")
        self._keep([index for index, row in enumerate(self.live) if row not in ended])

    def _draw(self, sizes: dict[int, int]) -> Iterator[Event]:
        """Append boi, an image and eoi to some live rows; sizes: the index of its size, by index."""

        def key(index: int) -> Any:
            return sizes[index], image_options(self.live[index].request)

        for (size, _), group in groupby(sorted(sizes, key=key), key):
            yield from self._draw_together(sorted(group), size)

    def _draw_together(self, indices: list[int], size: int) -> Iterator[Event]:
        """Images of one size and one sampling, in one batch."""
        rows = [self.live[index] for index in indices]
        for row in rows:
            yield from self._flush(row)
        chosen = [index in indices for index in range(len(self.live))]
        self._read([self.boi_ids[size]] * len(self.live), chosen)
        index = torch.tensor(indices, device=self.device)
        cache = self.cache.select(index)
        is_last = all(row.is_over for row in rows)  # nothing follows the image: it is not read
        for state in self._image_steps(cache, rows, self.logits[index], size):
            yield ImageStep(tuple(row.number for row in rows), state)
            latents = state.latents
            if all(row.is_cancelled for row in rows):
                return
            if self.is_interrupted:
                break
            shown = [i for i, row in enumerate(rows) if _is_shown(row, state)]
            if shown:
                for i, image in zip(shown, self.codec.decode_images(state.clean()[shown]), strict=True):
                    yield ImagePreview(rows[i].number, image, state.step, state.num_steps)
            if is_last and state.step == state.num_steps:
                break
        if not (is_last or self.is_interrupted):
            self.cache.assign(index, cache)
            self._read([self.tokenizer.eoi] * len(self.live), chosen)
        for row, image, own in zip(rows, self.codec.decode_images(latents), latents, strict=True):
            row.add_image(image, own.cpu().numpy(), size)
            yield ImageDone(row.number, image)

    def _image_steps(
        self, cache: KVCache, rows: list[Row], logits_BV: Tensor, size: int
    ) -> Iterator[DenoisingStep]:
        """Denoise an image behind each row's boi, or sample its codes; logits_BV: after the boi."""
        guides, sampling = self._guides(cache, rows, size), rows[0].request.sampling
        generators = [row.generator for row in rows]
        if self.config.codebook_size:
            first_code = self.tokenizer.num_ids(len(self.boi_ids))
            grid = self.config.grids[size]
            return sample_codes(
                self.decoder, cache, guides, logits_BV, grid, first_code, sampling, generators
            )
        shape = (self.config.latent_channels, *self.config.latent_sizes[size])
        noise = torch.stack([row.draw_noise(shape) for row in rows])
        return self.decoder.denoise(cache, guides, noise.to(self.device), sampling, generators)

    def _guides(self, cache: KVCache, rows: list[Row], size: int) -> list[Guide]:
        """Contexts that images of these rows are guided away from, each up to its boi.

        One scale: a document without anything but the negative prompt. Two scales: the row without its texts
        (but the negative prompt), then the row without its images.
        """
        sampling = rows[0].request.sampling
        text_scale, image_scale = sampling.guidance_scale, sampling.image_guidance_scale
        guides = []
        if text_scale != 1:
            negative = [text_segments(r.request.sampling.negative_prompt, self.tokenizer) for r in rows]
            kept = [[] if image_scale is None else row.images for row in rows]
            without_text = [a + b for a, b in zip(kept, negative, strict=True)]
            guides.append(self._guide(cache, rows, without_text, size, text_scale))
        if image_scale is not None and image_scale != 1:
            without_images = [row.texts for row in rows]
            guides.append(self._guide(cache, rows, without_images, size, image_scale))
        return guides

    def _guide(
        self, cache: KVCache, rows: list[Row], contexts: list[list[Segment]], size: int, scale: float
    ) -> Guide:
        """Guidance away from other documents of some rows, up to a boi; cache: of the rows themselves."""
        boi = torch.tensor([self.boi_ids[size]], device=self.device)
        every = torch.arange(len(rows), device=self.device)
        if not any(contexts):  # the same for all: computed once
            made = self.decoder.new_cache(1, self.cache.capacity)
            self.decoder.read_tokens(made, torch.full_like(boi, self.tokenizer.bos))
            logits = self.decoder.read_tokens(made, boi)
            return Guide(made.select(every * 0), scale, logits.expand(len(rows), -1))
        documents = [self._flatten(segments) for segments in contexts]
        lengths = torch.tensor([len(document) - 1 for document in documents], device=self.device)
        if all(row.begins_with(context) for row, context in zip(rows, contexts, strict=True)):
            made = cache.select(every)  # an image before its instruction: the row's own beginning
            made.lengths = lengths
        else:
            made = self.decoder.new_cache(len(rows), self.cache.capacity)
            self._prefill(made, documents, lengths)
        return Guide(made, scale, self.decoder.read_tokens(made, boi.expand(len(rows))))

    def _prefill(self, cache: KVCache, documents: list[FlatDocument], lengths: Tensor) -> Tensor:
        batch = collate([pack_row([document], self._shape(documents)) for document in documents])
        return self.decoder.read_prompts(cache, batch.to(self.device), lengths)

    def _read(self, tokens: list[int], is_read: list[bool]) -> None:
        """Append a token to some live rows, and update their logits."""
        tokens_B = torch.tensor(tokens, device=self.device)
        if all(is_read):
            self.logits = self.decoder.read_tokens(self.cache, tokens_B)
            return
        mask = torch.tensor(is_read, device=self.device)
        logits = self.decoder.read_tokens(self.cache, tokens_B, mask)
        self.logits = torch.where(mask[:, None], logits, self.logits)

    def _flush(self, row: Row) -> Iterator[Event]:
        """The text that a row's stream has held back, at the end of a run of tokens."""
        if text := row.text.flush():
            yield TextDelta(row.number, text)
        if not row.text.is_stopped:
            row.text = TextStream(self.tokenizer, row.request.sampling.stop)

    def _row(self, number: int, request: Request) -> Row:
        segments: list[Segment] = []
        for part in request.prompt:
            if isinstance(part, str):
                segments += text_segments(part, self.tokenizer)
            elif isinstance(part, Segment):
                segments.append(Segment("tokens", list(part.data)))
            else:
                segments.append(read_image(part, self.codec, self.config.image_sizes))
        return Row.of(number, request, segments, self.tokenizer)

    def _flatten(self, segments: list[Segment]) -> FlatDocument:
        causal = self.config.image_attention == "causal"
        return flatten(segments, self.tokenizer, self.config.patches, causal)

    def _shape(self, documents: Sequence[FlatDocument]) -> SequenceShape:
        return SequenceShape(
            length=max(map(len, documents)),
            num_images=max(1, *(len(document.images) for document in documents)),
            patches=self.config.patches,
            latent_channels=self.config.latent_channels,
            sizes=self.config.latent_sizes,
        )


def _is_shown(row: Row, state: DenoisingStep) -> bool:
    """Whether a step is followed by a preview of the row's image."""
    every = row.request.preview_every
    return every > 0 and state.step % every == 0 and state.step < state.num_steps


def check_request(
    request: Request, name: str, tokenizer: Tokenizer, model: ModelConfig, sequence_length: int | None
) -> int:
    """Positions of a request's prompt, from bos to eos. name: of the prompt, for the message.

    Raises UserError for one that leaves no room for an answer, or such a negative prompt.
    """
    most = sequence_length or UNKNOWN_LENGTH
    drawn = max(model.patches) + 2 if request.begin == "image" else 0
    answer = f"{drawn} of the image to draw" if drawn else "1 of the answer"
    length = count_positions(request.prompt, tokenizer, model)
    negative = count_positions([request.sampling.negative_prompt], tokenizer, model)
    for what, taken in ((name, length), ("negative_prompt", negative)):
        if taken + (drawn or 1) > most:
            raise UserError(
                f"{what} takes {taken} positions and {answer}, but the model was trained on sequences of "
                f"{most}; shorten it"
            )
    return length


def image_options(request: Request) -> str:
    """The options of a request's images: those with the same are denoised together, if of one size."""
    return repr(request.sampling.model_dump(exclude=TEXT_KEYS))
