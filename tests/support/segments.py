"""Documents of token ids and images, as tests write them down."""

from collections.abc import Sequence

import numpy as np

from megafusion.sequence.document import FlatDocument, ImageSegment, Segment, flatten
from megafusion.sequence.tokenizer import Tokenizer


def image_of(
    latents: np.ndarray, noise: np.ndarray | None = None, t: float = 0.0, size: int = 0
) -> ImageSegment:
    """A sampled image, without noise unless it is given."""
    return ImageSegment(
        size=size, latents=latents, noise=np.zeros_like(latents) if noise is None else noise, t=t
    )


def flat_document(
    segments: Sequence[np.ndarray | Segment],
    tokenizer: Tokenizer,
    patches: Sequence[int],
    causal_images: bool = False,
    clean_context: bool = False,
) -> FlatDocument:
    """`flatten`, where a text may be given by its ids alone."""
    whole = [segment if isinstance(segment, Segment) else Segment("tokens", segment) for segment in segments]
    return flatten(whole, tokenizer, patches, causal_images, clean_context)
