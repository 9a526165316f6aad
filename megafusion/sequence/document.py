"""From a document (texts and pictures in order) to the flat arrays that packing lays side by side."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megafusion.sequence.tokenizer import Tokenizer

IGNORED_LABEL = -100


@dataclass(frozen=True)
class NoisedImage:
    """An image as the model is trained on it: latents and noise float32 [C, H, W], and its timestep."""

    latents: np.ndarray
    noise: np.ndarray
    timestep: int


@dataclass(frozen=True)
class FlatDocument:
    """One document as a sequence of L positions with n images of P patches each.

    tokens int64 [L] (a filler under patches), labels int64 [L] (-100 where no loss),
    patch int32 [L] (which of the document's n x P patches stands here; -1 for text),
    row_end int32 [L] (exclusive end of the visible keys, from the document's start),
    image_start int32 [n] (each image's first patch).
    """

    tokens: np.ndarray
    labels: np.ndarray
    patch: np.ndarray
    row_end: np.ndarray
    image_start: np.ndarray
    images: tuple[NoisedImage, ...]

    def __len__(self) -> int:
        return len(self.tokens)


def flatten(
    segments: Sequence[np.ndarray | NoisedImage], tokenizer: Tokenizer, num_patches: int
) -> FlatDocument:
    """Lay out a document: bos, its texts and images in order (each image between boi and eoi), eos.

    Next-token targets stand at every position whose input is neither boi nor a patch: boi is predicted
    by the text before it, while what follows boi is denoised and eoi is put in without being asked for.
    """
    tokens, patch, image_start, images = [tokenizer.bos], [-1], [], []
    for segment in segments:
        if isinstance(segment, NoisedImage):
            tokens.append(tokenizer.boi)
            image_start.append(len(tokens))
            tokens += [tokenizer.eoi] * (num_patches + 1)  # the filler under patches is never read
            first = len(images) * num_patches
            patch += [-1, *range(first, first + num_patches), -1]
            images.append(segment)
        else:
            tokens += segment.tolist()
            patch += [-1] * len(segment)
    tokens.append(tokenizer.eos)
    patch.append(-1)
    return _finish(
        np.array(tokens, np.int64),
        np.array(patch, np.int32),
        np.array(image_start, np.int32),
        tuple(images),
        tokenizer.boi,
        num_patches,
    )


def split_text(document: FlatDocument, length: int) -> list[FlatDocument]:
    """Cut a document without images into pieces of at most `length` positions; no target is lost."""
    return [
        FlatDocument(
            tokens=document.tokens[first : first + length],
            labels=document.labels[first : first + length],
            patch=document.patch[first : first + length],
            row_end=np.arange(1, len(document.tokens[first : first + length]) + 1, dtype=np.int32),
            image_start=document.image_start,
            images=(),
        )
        for first in range(0, len(document), length)
    ]


def _finish(tokens, patch, image_start, images, boi, num_patches) -> FlatDocument:
    labels = np.full_like(tokens, IGNORED_LABEL)
    asks = (patch[:-1] < 0) & (tokens[:-1] != boi)
    labels[:-1][asks] = tokens[1:][asks]
    row_end = np.arange(1, len(tokens) + 1, dtype=np.int32)
    for start in image_start:
        row_end[start : start + num_patches] = start + num_patches
    return FlatDocument(tokens, labels, patch, row_end, image_start, images)
