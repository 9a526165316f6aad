"""A row to generate: what is asked, and what there is of its answer so far."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from megafusion.generate.text import TextStream, cut_at_stop, uniform_source
from megafusion.images.codec import ImageCodec
from megafusion.images.reader import convert_to_rgb
from megafusion.images.sizes import Size, nearest_size
from megafusion.model.config import ModelConfig
from megafusion.objective.config import SamplingConfig
from megafusion.sequence.document import ImageSegment, Segment
from megafusion.sequence.text import clean_text
from megafusion.sequence.tokenizer import Tokenizer

Part = str | Image.Image
Begin = Literal["free", "text", "image"]


@dataclass(frozen=True)
class Request:
    """One row to generate.

    prompt: texts, which are cleaned, images, and segments of tokens, which are taken as they are.
    begin, max_images: as in `TransfusionPipeline.generate`. seed: of the row's noise and tokens, whatever its
    batch; noise: a generator of the noise in place of the seed's; start: float32 [C, h, w], the noise itself.
    size: index of the size of drawn images;
    None lets the model choose by its begin-of-image (boi) token. preview_every: denoising steps between
    previews of its images; 0 for none.
    """

    prompt: Sequence[Part | Segment]
    sampling: SamplingConfig
    seed: int = 0
    begin: Begin = "free"
    max_images: int = 1
    size: int | None = None
    noise: torch.Generator | None = None
    start: Tensor | None = None
    preview_every: int = 0


@dataclass(eq=False)
class Row:
    """A row in the making.

    segments: its prompt and answer, as documents have them. generator: of its noise; one for each row, so
    that it does not depend on the others. uniform: random numbers of its tokens. output: images, and token
    ids that are not decoded to text yet. num_prompt_tokens: positions of the prompt, from bos to eos.
    is_full: whether its last token took the last position of a row.
    """

    number: int
    request: Request
    segments: list[Segment]
    generator: torch.Generator
    uniform: np.random.Generator
    text: TextStream
    images_left: int
    num_prompt_tokens: int = 0
    output: list[Any] = field(default_factory=list)
    steps: int = 0
    is_full: bool = False
    is_cancelled: bool = False

    @classmethod
    def of(cls, number: int, request: Request, segments: list[Segment], tokenizer: Tokenizer) -> "Row":
        """A row that has a prompt's segments, and nothing of its answer."""
        return cls(
            number,
            request,
            segments,
            request.noise or torch.Generator().manual_seed(request.seed),
            uniform_source(request.seed),
            TextStream(tokenizer, request.sampling.stop),
            request.max_images,
        )

    @property
    def images(self) -> list[Segment]:
        """The images of prompt and answer."""
        return [segment for segment in self.segments if isinstance(segment, ImageSegment)]

    @property
    def texts(self) -> list[Segment]:
        """The texts of prompt and answer."""
        return [segment for segment in self.segments if not isinstance(segment, ImageSegment)]

    @property
    def is_over(self) -> bool:
        """Whether no token can follow: there is room for none, none is asked for, or there is a stop text."""
        is_complete = self.steps >= self.request.sampling.max_new_tokens
        return self.is_full or is_complete or self.text.is_stopped

    def draw_noise(self, shape: Sequence[int]) -> Tensor:
        """Unit normal noise [C, h, w] that the next image begins with, on the host."""
        if self.request.start is not None:
            return self.request.start
        return torch.randn(shape, generator=self.generator, device=self.generator.device).cpu()

    def begins_with(self, segments: list[Segment]) -> bool:
        """Whether prompt and answer begin with these segments."""
        own = self.segments[: len(segments)]
        return len(own) == len(segments) and all(a is b for a, b in zip(own, segments, strict=True))

    def add_token(self, token: int) -> None:
        self.output.append(token)
        if self.segments and not isinstance(self.segments[-1], ImageSegment):
            self.segments[-1].data.append(token)
        else:
            self.segments.append(Segment("tokens", [token]))

    def add_image(self, image: Image.Image, latents: np.ndarray, size: int) -> None:
        self.output.append(image)
        self.images_left -= 1
        self.segments.append(image_segment(latents, size))

    def parts(self, tokenizer: Tokenizer) -> list[Part]:
        """The answer so far: each run of token ids decoded to one text, up to a stop text."""
        parts: list[Part] = []
        for is_token, run in groupby(self.output, lambda part: isinstance(part, int)):
            found: list[Any] = list(run)
            if is_token:
                text = cut_at_stop(tokenizer.decode(found), self.request.sampling.stop)
                found = [text] if text or not self.text.is_stopped else []
            parts += found
        return parts


def text_segments(text: str, tokenizer: Tokenizer) -> list[Segment]:
    """A text as a segment, cleaned as captions were; none where nothing is left."""
    ids = tokenizer.encode(clean_text(text))
    return [Segment("tokens", list(ids))] if ids else []


def count_positions(prompt: Sequence[Part | Segment], tokenizer: Tokenizer, model: ModelConfig) -> int:
    """Positions of a prompt as a document, from bos to eos. Encodes no image."""
    count = 2
    for part in prompt:
        if isinstance(part, str):
            count += sum(len(segment.data) for segment in text_segments(part, tokenizer))
        elif isinstance(part, Segment):
            count += len(part.data)
        else:
            image = convert_to_rgb(part)
            count += model.patches[nearest_size(image.height, image.width, model.image_sizes)] + 2
    return count


def read_image(image: Image.Image, codec: ImageCodec, sizes: Sequence[Size]) -> ImageSegment:
    """An image of a prompt as a segment: clean, at the nearest of the sizes."""
    image = convert_to_rgb(image)
    size = nearest_size(image.height, image.width, sizes)
    return image_segment(codec.encode_images([image], sizes[size])[0].cpu().numpy(), size)


def image_segment(latents: np.ndarray, size: int) -> ImageSegment:
    """Clean latents [C, h, w], or codes [h, w], as a segment."""
    if latents.ndim == 2:
        return ImageSegment("codes", latents, size)
    return ImageSegment(size=size, latents=latents, noise=np.zeros_like(latents))
