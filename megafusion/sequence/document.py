"""From a document (texts and pictures in order) to the flat arrays that packing lays side by side."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megafusion.sequence.tokenizer import Tokenizer

IGNORED_LABEL = -100


@dataclass(frozen=True)
class NoisedImage:
    """An image as the model is trained on it: latents and noise float32 [C, h, w], and its t in [0, 1).

    picture: uint8 [3, H, W] where latents are to be made of one; those are standard normal until then.
    size: index of its size among the model's.
    """

    latents: np.ndarray
    noise: np.ndarray
    t: float
    picture: np.ndarray | None = None
    size: int = 0


@dataclass(frozen=True)
class FlatDocument:
    """One document as a sequence of L positions with n images of at most P patches each.

    tokens int64 [L] (a filler under patches), labels int64 [L] (-100 where no loss),
    patch int32 [L] (which of the document's n x P patches stands here, also where images of other sizes have
    fewer; -1 for text),
    row_end int32 [L] (exclusive end of the visible keys, from the document's start),
    image_start int32 [n] (each image's first patch).
    """

    tokens: np.ndarray
    labels: np.ndarray
    patch: np.ndarray
    row_end: np.ndarray
    image_start: np.ndarray
    images: tuple[NoisedImage | Any, ...]

    def __len__(self) -> int:
        return len(self.tokens)


def flatten(
    segments: Sequence[np.ndarray | Any],
    tokenizer: Tokenizer,
    patches: Sequence[int],
) -> FlatDocument:
    """Lay out a document: bos, its texts and images in order (each image between boi and eoi), eos.

    Texts are arrays of ids; anything else is an image, which goes into `images` as it is; its `size` says
    which of `patches` it has, and with which boi it begins.
    Next-token targets stand at every position whose input is neither boi nor a patch: boi is predicted
    by the text before it, while what follows boi is denoised and eoi is put in without being asked for.
    """
    images = tuple(segment for segment in segments if not isinstance(segment, np.ndarray))
    texts = [segment for segment in segments if isinstance(segment, np.ndarray)]
    most = max(patches)
    length = 2 + sum(map(len, texts)) + sum(patches[image.size] + 2 for image in images)
    tokens = np.full(length, tokenizer.eoi, np.int64)  # the filler under patches is never read
    patch = np.full(length, -1, np.int32)
    begins = np.zeros(length, bool)
    row_end = np.arange(1, length + 1, dtype=np.int32)
    image_start, first = [], 1
    tokens[0], tokens[-1] = tokenizer.bos, tokenizer.eos
    for segment in segments:
        if isinstance(segment, np.ndarray):
            tokens[first : first + len(segment)] = segment
            first += len(segment)
            continue
        tokens[first], begins[first] = tokenizer.boi_of_size(segment.size), True
        here = slice(first + 1, first + 1 + patches[segment.size])
        patch[here] = len(image_start) * most + np.arange(patches[segment.size])
        row_end[here] = here.stop
        image_start.append(here.start)
        first = here.stop + 1
    labels = np.full(length, IGNORED_LABEL, np.int64)
    asks = (patch[:-1] < 0) & ~begins[:-1]
    labels[:-1][asks] = tokens[1:][asks]
    return FlatDocument(tokens, labels, patch, row_end, np.array(image_start, np.int32), images)


def cut_document(document: FlatDocument, first: int, last: int) -> FlatDocument:
    """Positions [first, last) of a document as a document of its own; neither end may part an image.

    It sees nothing of what stood before it and its positions restart; its last position keeps its target,
    which is the next piece's first token (boi among them), so that pieces end to end lose no target and
    double none.
    """
    here = images_between(document, first, last)
    image_start, patch = document.image_start[here], document.patch[first:last]
    if here.start and len(image_start):
        patch = np.where(patch < 0, -1, patch - document.patch[image_start[0]])
    return FlatDocument(
        tokens=document.tokens[first:last],
        labels=document.labels[first:last],
        patch=patch,
        row_end=document.row_end[first:last] - first,
        image_start=image_start - first,
        images=document.images[here],
    )


def images_between(document: FlatDocument, first: int, last: int) -> slice:
    """Which images stand in positions [first, last), neither of which parts one."""
    return slice(*np.searchsorted(document.image_start, (first, last)).tolist())


def find_cut(document: FlatDocument, first: int, last: int, room: int, slots: int, least: int) -> int:
    """Where to cut [first, last) so that at most `room` positions and `slots` images come first.

    `last` where no cut is needed; `first` where there is no place for one that parts no image and leaves
    `least` positions on either side.
    """
    end = last if last - first <= room else min(first + room, last - least)
    if document.images:
        here = images_between(document, first, last)
        if here.stop - here.start > slots:
            end = min(end, int(document.image_start[here.start + slots]) - 1)
        image = int(np.searchsorted(document.image_start, end, side="right")) - 1
        if image >= 0:
            start = int(document.image_start[image])
            # From boi up to eoi, which stands where the image's patches end.
            end = start - 1 if end <= document.row_end[start] else end
    return end if end == last or end - first >= least else first
