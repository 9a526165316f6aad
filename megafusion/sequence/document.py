"""From a document (texts and images in order) to flat arrays of positions, which packing concatenates."""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from megafusion.sequence.tokenizer import Tokenizer

IGNORED_LABEL = -100


@dataclass(frozen=True)
class Segment:
    """A text or an image of a document, as a shard holds it.

    kind     data
    tokens   a text: token ids without bos and eos, int [L]
    moments  an image: mean and log-variance of its raw latents, float16 [2, C, h, w]
    pixels   an image: a WebP file; uint8 [3, H, W] once decoded
    codes    an image: indices into an autoencoder's codebook, int32 [h, w]
    latents  an image that never was in a shard: none
    """

    kind: Literal["tokens", "moments", "pixels", "codes", "latents"]
    data: Any


@dataclass(frozen=True)
class ImageSegment(Segment):
    """An image with the values that training samples for it.

    size: index of its size among the model's. max_t: limit of its t. is_given: a condition, as in a prompt:
    clean (t 0 and no noise), and without a loss. Codes have none of the values below.
    latents, noise: float32 [C, h, w], None until sampled. t: its time in the noise process, in [0, 1).
    If kind is pixels, latents are a standard normal sample until the image encoder has encoded the pixels.
    """

    kind: Literal["moments", "pixels", "codes", "latents"] = "latents"
    data: Any = None
    size: int = 0
    max_t: float = 1.0
    is_given: bool = False
    latents: np.ndarray | None = None
    noise: np.ndarray | None = None
    t: float = 0.0


@dataclass(frozen=True)
class FlatDocument:
    """One document as a sequence of L positions with n images of at most P patches or codes each.

    tokens int64 [L], a filler under patches; labels int64 [L], -100 where there is no next-token loss;
    patch int32 [L]: index of the position's patch among the document's n x P, -1 for text and codes (an image
    of fewer than P patches leaves the last of its indices unused);
    row_end int32 [L]: exclusive end of the visible keys, counted from the document's start;
    image_start, image_end int32 [n]: positions of each image's first patch or code, and of its eoi;
    copies int32 [n]: with clean context, the patches of each image's noised copy, which a row holds behind
    the document, 0 for a given image; else None.
    """

    tokens: np.ndarray
    labels: np.ndarray
    patch: np.ndarray
    row_end: np.ndarray
    image_start: np.ndarray
    image_end: np.ndarray
    images: tuple[ImageSegment, ...]
    copies: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def positions_in_row(self, start: int, end: int) -> int:
        """Positions that [start, end) takes in a row, with the copies of its images."""
        copied = 0 if self.copies is None else int(self.copies[images_between(self, start, end)].sum())
        return end - start + copied


def flatten(
    segments: Sequence[Segment],
    tokenizer: Tokenizer,
    patches: Sequence[int],
    causal_images: bool = False,
    clean_context: bool = False,
) -> FlatDocument:
    """Lay out a document: bos, its texts and images in order (each image between boi and eoi), eos.

    The only place where the kind of a segment decides on tokens, labels and mask. patches: number of patches
    or codes of an image of each size, which also decides on its boi. causal_images: patches see what is
    before them alone, and not their whole image. clean_context: images that are not given have copies.
    Every position has a next-token target except boi and patches: the position before predicts boi, what
    follows boi is denoised, and eoi is never predicted. An image of codes is as text: its codes are tokens
    behind the tokenizer's, each sees those before it, and they and eoi are predicted, unless it is given.
    """
    max_patches = max(patches)
    length = 2 + sum(_num_positions(segment, patches) for segment in segments)
    tokens = np.full(length, tokenizer.eoi, np.int64)  # the filler under patches is never read
    patch = np.full(length, -1, np.int32)
    has_target = np.ones(length, bool)
    row_end = np.arange(1, length + 1, dtype=np.int32)
    images: list[ImageSegment] = []
    image_start, image_end, start = [], [], 1
    tokens[0], tokens[-1] = tokenizer.bos, tokenizer.eos
    for segment in segments:
        end = start + _num_positions(segment, patches)
        if not isinstance(segment, ImageSegment):
            tokens[start:end] = segment.data
        else:
            tokens[start] = tokenizer.boi_of_size(segment.size)
            if segment.kind == "codes":
                tokens[start + 1 : end - 1] = tokenizer.num_ids(len(patches)) + segment.data.ravel()
            else:
                patch[start + 1 : end - 1] = len(images) * max_patches + np.arange(patches[segment.size])
                if not causal_images:
                    row_end[start + 1 : end - 1] = end - 1
            has_target[start : end - 1] = segment.kind == "codes" and not segment.is_given
            image_start.append(start + 1)
            image_end.append(end - 1)
            images.append(segment)
        start = end
    labels = np.full(length, IGNORED_LABEL, np.int64)
    labels[:-1][has_target[:-1]] = tokens[1:][has_target[:-1]]
    starts, ends = (np.array(bound, np.int32) for bound in (image_start, image_end))
    copies = None
    if clean_context:
        copies = np.array([0 if i.is_given else patches[i.size] for i in images], np.int32)
    return FlatDocument(tokens, labels, patch, row_end, starts, ends, tuple(images), copies)


def _num_positions(segment: Segment, patches: Sequence[int]) -> int:
    return patches[segment.size] + 2 if isinstance(segment, ImageSegment) else len(segment.data)


def cut_document(document: FlatDocument, start: int, end: int) -> FlatDocument:
    """Positions [start, end) of a document as a document of its own; neither bound may split an image.

    Its positions restart and it sees nothing before it. Its last position keeps its target, the first token
    of the next piece (which may be boi), so no target is lost or doubled.
    """
    here = images_between(document, start, end)
    image_start, patch = document.image_start[here], document.patch[start:end]
    if here.start and len(image_start):
        patch = np.where(patch < 0, -1, patch - document.patch[image_start[0]])
    return FlatDocument(
        tokens=document.tokens[start:end],
        labels=document.labels[start:end],
        patch=patch,
        row_end=document.row_end[start:end] - start,
        image_start=image_start - start,
        image_end=document.image_end[here] - start,
        images=document.images[here],
        copies=None if document.copies is None else document.copies[here],
    )


def images_between(document: FlatDocument, start: int, end: int) -> slice:
    """Indices of the images in positions [start, end), neither of which splits one."""
    return slice(bisect_left(document.image_start, start), bisect_left(document.image_start, end))


def find_cut(document: FlatDocument, start: int, end: int, room: int, slots: int, min_length: int) -> int:
    """Where to cut [start, end) so that the first piece takes at most `room` positions and `slots` images of
    a row.

    `end` if no cut is needed; `start` if no cut leaves `min_length` positions on either side and every image
    complete.
    """
    if document.copies is not None:
        here = images_between(document, start, end)
        copied = document.copies[here].cumsum()
        # The images that fit with their copies, and the room beside these.
        num_fit = int((document.image_end[here] + 1 - start + copied <= room).sum())
        slots = min(slots, num_fit)
        room -= int(copied[num_fit - 1]) if num_fit else 0
    cut = end if end - start <= room else min(start + room, end - min_length)
    if document.images:
        here = images_between(document, start, end)
        if here.stop - here.start > slots:
            cut = min(cut, int(document.image_start[here.start + slots]) - 1)
        image = bisect_right(document.image_start, cut) - 1
        if image >= 0:
            boi = int(document.image_start[image]) - 1
            cut = boi if cut <= document.image_end[image] else cut
    return cut if cut == end or cut - start >= min_length else start
