"""Documents side by side in rows of one length and one number of image slots."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megafusion.images.sizes import Size, bounding_size
from megafusion.sequence.document import IGNORED_LABEL, FlatDocument
from megafusion.sequence.intervals import Intervals


@dataclass(frozen=True)
class SequenceShape:
    """The fixed shape of a packed sequence: S positions and N image slots.

    An image of size n has patches[n] patches, and latents [C, h, w] where h x w is sizes[n].
    pixels_per_latent: along a side, where images come as pixels; 0 where they come as latents.
    """

    length: int
    num_images: int
    patches: tuple[int, ...]
    latent_channels: int
    sizes: tuple[Size, ...]
    pixels_per_latent: int = 0

    @cached_property
    def image_sizes(self) -> tuple[Size, ...]:
        """Height and width in pixels of an image of each size."""
        factor = self.pixels_per_latent
        return tuple((height * factor, width * factor) for height, width in self.sizes)

    def fits(self, document: FlatDocument, used_length: int = 0, used_images: int = 0) -> bool:
        """Whether a document still fits behind what a row holds already."""
        return (
            used_length + len(document) <= self.length
            and used_images + len(document.images) <= self.num_images
        )


class Inputs(NamedTuple):
    """What the model reads of a packed batch; fields as there."""

    tokens: Tensor
    patch_index: Tensor
    positions: Tensor
    row_start: Tensor
    row_end: Tensor
    latents: Tensor
    noise: Tensor
    t: Tensor
    image_start: Tensor
    image_size: Tensor


class Targets(NamedTuple):
    """What the losses read of a packed batch; fields as there."""

    labels: Tensor
    latents: Tensor
    noise: Tensor
    t: Tensor
    image_start: Tensor
    num_text_targets: Tensor
    num_images: Tensor
    image_size: Tensor


@dataclass
class PackedBatch:
    """B packed rows: what a stream yields, what the first and the last stage read.

    tokens int64 [B, S] with a filler under patches; labels int64 [B, S], -100 where no LM loss;
    positions int32 [B, S], restarting at each document; patch_index int32 [B, S]: which of the row's
    N x P patches stands here, -1 for text; row_start, row_end int32 [B, S]: the mask;
    latents, noise float32 [B, N, C, H, W], zeros in unused slots;
    t float32 [B, N]: each image's time in the noise process, in [0, 1);
    image_start int32 [B, N]: first position of each image, -1 for an unused slot;
    image_size int64 [B, N]: index of each image's size. Of several, P is the largest's number of patches, H
    and W are the largest height and width, and an image or picture stands at the top left, before zeros;
    pictures uint8 [B, N, 3, H, W], or empty; has_picture bool [B, N]: latents are still to be made of it.
    num_text_targets, num_images int64 []: of the whole global batch, the losses' denominators.
    """

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    patch_index: Tensor
    row_start: Tensor
    row_end: Tensor
    latents: Tensor
    noise: Tensor
    t: Tensor
    image_start: Tensor
    image_size: Tensor
    pictures: Tensor
    has_picture: Tensor
    num_text_targets: Tensor
    num_images: Tensor

    def inputs(self) -> Inputs:
        return Inputs(*(getattr(self, name) for name in Inputs._fields))

    def targets(self) -> Targets:
        return Targets(*(getattr(self, name) for name in Targets._fields))

    def intervals(self) -> Intervals:
        """The mask of this batch, to be made once and handed to every layer."""
        return Intervals(self.row_start, self.row_end, self.tokens.shape[1])

    def to(self, device: torch.device | str) -> "PackedBatch":
        return PackedBatch(
            **{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)}
        )

    def pinned(self) -> "PackedBatch":
        """A copy in memory from which a GPU copies without waiting."""
        return PackedBatch(**{f.name: getattr(self, f.name).pin_memory() for f in fields(self)})

    def counts(self) -> Tensor:
        """int64 [2]: text targets and images in these rows alone."""
        return torch.stack([(self.labels != IGNORED_LABEL).sum(), (self.image_start >= 0).sum()])


def pack_row(documents: Sequence[FlatDocument], shape: SequenceShape) -> dict[str, np.ndarray]:
    """One row from documents that fit in it together. Positions left over see only themselves."""
    length, slots = shape.length, shape.num_images
    own = np.arange(length, dtype=np.int32)
    most, latents = max(shape.patches), (shape.latent_channels, *bounding_size(shape.sizes))
    row = {
        "tokens": np.zeros(length, np.int64),
        "labels": np.full(length, IGNORED_LABEL, np.int64),
        "positions": np.zeros(length, np.int32),
        "patch_index": np.full(length, -1, np.int32),
        "row_start": own.copy(),
        "row_end": own + 1,
        "latents": np.zeros((slots, *latents), np.float32),
        "noise": np.zeros((slots, *latents), np.float32),
        "t": np.zeros(slots, np.float32),
        "image_start": np.full(slots, -1, np.int32),
        "image_size": np.zeros(slots, np.int64),
        "pictures": np.zeros((slots, 3, *bounding_size(shape.image_sizes)), np.uint8),
        "has_picture": np.zeros(slots, bool),
    }
    first, slot = 0, 0
    for document in documents:
        assert shape.fits(document, first, slot)
        here = slice(first, first + len(document))
        row["tokens"][here] = document.tokens
        row["labels"][here] = document.labels
        row["positions"][here] = own[: len(document)]
        patches = document.patch
        row["patch_index"][here] = np.where(patches < 0, -1, patches + slot * most)
        row["row_start"][here] = first
        row["row_end"][here] = document.row_end + first
        for image, start in zip(document.images, document.image_start, strict=True):
            height, width = image.latents.shape[1:]
            row["latents"][slot, :, :height, :width] = image.latents
            row["noise"][slot, :, :height, :width] = image.noise
            row["t"][slot] = image.t
            row["image_start"][slot] = first + start
            row["image_size"][slot] = image.size
            if image.picture is not None:
                height, width = image.picture.shape[1:]
                row["pictures"][slot, :, :height, :width] = image.picture
                row["has_picture"][slot] = True
            slot += 1
        first += len(document)
    return row


def collate(rows: Sequence[dict[str, np.ndarray]]) -> PackedBatch:
    """Stack rows into a batch whose denominators count these rows alone; see `with_counts`."""
    stacked = {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}
    zero = torch.zeros((), dtype=torch.int64)
    batch = PackedBatch(**stacked, num_text_targets=zero, num_images=zero)
    return with_counts(batch, batch.counts())


def with_counts(batch: PackedBatch, counts: Tensor) -> PackedBatch:
    """Set the losses' denominators: int64 [2], text targets and images of the whole global batch."""
    batch.num_text_targets, batch.num_images = counts.unbind()
    return batch
