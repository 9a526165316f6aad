"""Documents packed into rows of one length and one number of image slots."""

from collections import namedtuple
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from megafusion.images.sizes import Size, bounding_size
from megafusion.sequence.document import IGNORED_LABEL, FlatDocument
from megafusion.sequence.intervals import Intervals

ZERO = torch.zeros((), dtype=torch.int64)
TARGETS_ALIGNMENT = 128


@dataclass(frozen=True)
class SequenceShape:
    """The fixed shape of a packed sequence: S positions and N image slots.

    An image of size n has patches[n] patches, and latents [C, h, w] where h x w is sizes[n]. Images of codes
    have no latents (C is 0), and take no slot: N is then the most images of a row.
    pixels_per_latent: along a side, where images come as pixels; 0 where they come as latents.
    causal_images: see `flatten`. clean_context: whether documents have noised copies of their images.
    """

    length: int
    num_images: int
    patches: tuple[int, ...]
    latent_channels: int
    sizes: tuple[Size, ...]
    pixels_per_latent: int = 0
    causal_images: bool = False
    clean_context: bool = False

    @cached_property
    def image_sizes(self) -> tuple[Size, ...]:
        """Height and width in pixels of an image of each size."""
        factor = self.pixels_per_latent
        return tuple((height * factor, width * factor) for height, width in self.sizes)


Inputs = namedtuple(
    "Inputs",
    "tokens patch_index positions row_end last_query latents noise t image_start image_size features",
)
"""The fields of a PackedBatch that the model reads."""
Targets = namedtuple(
    "Targets", "labels latents noise t has_loss num_text_targets num_images image_size target_index"
)
"""The fields of a PackedBatch that the losses read."""


@dataclass
class PackedBatch:
    """B packed rows: what the data loader yields, and what the first and last pipeline stages read.

    tokens int64 [B, S] with a filler under patches; labels int64 [B, S], -100 where there is no text loss;
    positions int32 [B, S], restarting at each document; patch_index int32 [B, S]: index of the position's
    patch among the row's N x P noised ones, or, with clean context, behind them among as many clean ones, -1
    for text; row_end, last_query int32 [B, S]: the mask;
    latents, noise float32 [B, N, C, H, W], zeros in unused slots;
    t float32 [B, N]: each image's time in the noise process, in [0, 1);
    image_start int32 [B, N]: position of each image's first patch, with clean context that of its noised
    copy, -1 for an unused slot;
    image_size int64 [B, N], on the host: index of each image's size. P is the largest size's number of
    patches, H and W are the largest height and width, and an image lies at the top left, padded with zeros;
    has_loss bool [B, N]: the slot holds an image that is denoised, and not one that is given;
    features float32 [B, N, P, F] of a vision model at each patch, zeros where there are none; or of no size;
    pixels uint8 [B, N, 3, H, W] or empty; has_pixels bool [B, N]: latents are still to be encoded from them.
    num_text_targets, num_images (with a loss) int64 []: of the whole global batch, the losses' denominators;
    target_index int64 [R]: the positions of `target_index`.
    """

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    patch_index: Tensor
    row_end: Tensor
    last_query: Tensor
    latents: Tensor
    noise: Tensor
    t: Tensor
    image_start: Tensor
    image_size: Tensor
    has_loss: Tensor
    pixels: Tensor
    has_pixels: Tensor
    num_text_targets: Tensor = ZERO
    num_images: Tensor = ZERO
    target_index: Tensor = ZERO
    features: Tensor = ZERO

    def __getstate__(self) -> dict[str, np.ndarray]:
        """Arrays, which a worker process sends through a pipe: tensors would go through shared memory, of
        which containers have little."""
        return {name: tensor.numpy() for name, tensor in vars(self).items()}

    def __setstate__(self, state: dict[str, np.ndarray]) -> None:
        vars(self).update({name: torch.from_numpy(array) for name, array in state.items()})

    def inputs(self) -> Inputs:
        return Inputs(*(getattr(self, name) for name in Inputs._fields))

    def targets(self) -> Targets:
        return Targets(*(getattr(self, name) for name in Targets._fields))

    def intervals(self, has_holes: bool = False) -> Intervals:
        """The mask, to be made once and handed to every layer. has_holes: with clean context."""
        return Intervals(self.row_end, self.last_query, self.tokens.shape[1], has_holes=has_holes)

    def to(self, device: torch.device | str) -> "PackedBatch":
        """The batch on a device; image_size stays on the host, which groups images by it."""
        own = {name: tensor for name, tensor in vars(self).items() if name != "image_size"}
        sent = send_storages(own, lambda storage: storage.to(device, non_blocking=True))
        return PackedBatch(**sent, image_size=self.image_size)

    def pinned(self) -> "PackedBatch":
        """A copy in memory from which a GPU copies without waiting, and most of it at once.

        Pixels are apart, and the latents that take their place: they are sent before the rest.
        """
        apart = {"pixels", "latents"} if self.pixels.numel() else set()
        together = {name: tensor for name, tensor in vars(self).items() if name not in apart}
        own = {name: getattr(self, name).pin_memory() for name in apart}
        return PackedBatch(**in_one_storage(together, pin_memory=True), **own)

    def counts(self) -> Tensor:
        """int64 [2]: text targets and images with a loss in these rows alone."""
        return torch.stack([(self.labels != IGNORED_LABEL).sum(), self.has_loss.sum()])

    def work(self, num_sizes: int = 1) -> Tensor:
        """int64 [2 + num_sizes], of these rows alone: text targets, pairs of a query and a key that it sees,
        images of each size."""
        images = torch.bincount(self.image_size[self.image_start >= 0], minlength=num_sizes)
        # The queries of key j begin behind all i whose row_end is at most j; there are S - row_end(i) such j.
        num_pairs = (self.last_query + self.row_end - self.row_end.shape[1]).sum()
        counts = torch.stack([(self.labels != IGNORED_LABEL).sum(), num_pairs])
        return torch.cat([counts, images])


STORAGE_ALIGNMENT = 16
"""Bytes, of every tensor in a shared storage."""


def in_one_storage(tensors: dict[str, Tensor], pin_memory: bool = False) -> dict[str, Tensor]:
    """Copies of host tensors that share one storage."""
    ends = [0]
    for tensor in tensors.values():
        ends.append(ends[-1] + -(-tensor.nbytes // STORAGE_ALIGNMENT) * STORAGE_ALIGNMENT)
    storage = torch.empty(ends[-1], dtype=torch.uint8, pin_memory=pin_memory)
    copies = {}
    for start, (name, tensor) in zip(ends, tensors.items(), strict=False):
        own = storage[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        copies[name] = own.copy_(tensor)
    return copies


def send_storages(tensors: dict[str, Tensor], send: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Send each tensor by `send`; those that share a storage are sent in one piece.

    send: called with a tensor, or with a whole storage as bytes, and gives one of the same shape.
    """
    by_storage: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        by_storage.setdefault(tensor.untyped_storage().data_ptr(), []).append(name)
    sent: dict[str, Tensor] = {}
    for names in by_storage.values():
        storage = tensors[names[0]].untyped_storage()
        if len(names) == 1 or not storage.data_ptr():  # empty ones and those without memory have none
            sent |= {name: send(tensors[name]) for name in names}
            continue
        whole = torch.empty(0, dtype=torch.uint8, device=tensors[names[0]].device).set_(storage)
        arrived = send(whole)
        for name in names:
            own = tensors[name]
            typed = torch.empty(0, dtype=own.dtype, device=arrived.device)
            sent[name] = typed.set_(arrived.untyped_storage(), own.storage_offset(), own.shape, own.stride())
    return sent


def pack_row(documents: Sequence[FlatDocument], shape: SequenceShape) -> PackedBatch:
    """A batch of one row, from documents that fit in it together; `collate` sets its denominators.

    Padding positions attend only to themselves. Behind a document come the noised copies of its images, the
    last image's first: so the copies that see a key are the first ones, and its queries one interval.
    """
    length, slots = shape.length, shape.num_images
    own = np.arange(length, dtype=np.int32)
    max_patches, latents = max(shape.patches), (shape.latent_channels, *bounding_size(shape.sizes))
    row: dict[str, np.ndarray] = {
        "tokens": np.zeros(length, np.int64),
        "labels": np.full(length, IGNORED_LABEL, np.int64),
        "positions": np.zeros(length, np.int32),
        "patch_index": np.full(length, -1, np.int32),
        "row_end": own + 1,
        "last_query": own + 1,
        "latents": np.zeros((slots, *latents), np.float32),
        "noise": np.zeros((slots, *latents), np.float32),
        "t": np.zeros(slots, np.float32),
        "image_start": np.full(slots, -1, np.int32),
        "image_size": np.zeros(slots, np.int64),
        "has_loss": np.zeros(slots, bool),
        "pixels": np.zeros((slots, 3, *bounding_size(shape.image_sizes)), np.uint8),
        "has_pixels": np.zeros(slots, bool),
    }
    start, slot = 0, 0
    for document in documents:
        past = start + document.positions_in_row(0, len(document))
        assert past <= length
        assert slot + len(document.images) <= slots
        here = slice(start, start + len(document))
        row["tokens"][here] = document.tokens
        row["labels"][here] = document.labels
        row["positions"][here] = own[: len(document)]
        patch = document.patch
        row["patch_index"][here] = np.where(patch < 0, -1, patch + slot * max_patches)
        row["row_end"][here] = document.row_end + start
        row["last_query"][here] = here.stop
        image_starts = document.image_start + start
        if document.copies is not None:
            image_starts = _append_copies(row, document, start, slots * max_patches)
        for image, image_start in zip(document.images, image_starts, strict=True):
            if image.kind == "codes":
                continue
            assert image.latents is not None
            height, width = image.latents.shape[1:]
            row["latents"][slot, :, :height, :width] = image.latents
            row["noise"][slot, :, :height, :width] = image.noise
            row["t"][slot] = image.t
            row["image_start"][slot] = image_start
            row["image_size"][slot] = image.size
            row["has_loss"][slot] = not image.is_given
            if image.kind == "pixels":
                height, width = image.data.shape[1:]
                row["pixels"][slot, :, :height, :width] = image.data
                row["has_pixels"][slot] = True
            slot += 1
        start = past
    return PackedBatch(**{name: torch.from_numpy(array[None]) for name, array in row.items()})


def _append_copies(
    row: dict[str, np.ndarray], document: FlatDocument, start: int, num_noised: int
) -> np.ndarray:
    """Make the images of a document at `start` of a row clean, and write their noised copies behind it.

    num_noised: N x P, from which the clean patches are counted. Returns the start of each image's copy; of a
    given image, which has none, its own.
    """
    assert document.copies is not None
    end, image_starts = start + len(document), document.image_start + start
    here = slice(start, end)
    # Patches of the copies from each image's on, and 0: the copies of later images stand before an image's.
    copied = np.append(document.copies[::-1].cumsum()[::-1], 0).astype(np.int32)
    behind = np.searchsorted(image_starts, np.arange(start, end), side="right")
    row["last_query"][here] += copied[behind]
    for number in np.flatnonzero(document.copies):
        first, size = image_starts[number], document.copies[number]
        image, copy = slice(first, first + size), slice(end + copied[number + 1], end + copied[number])
        for name in ("tokens", "positions", "patch_index"):
            row[name][copy] = row[name][image]
        row["row_end"][copy] = row["last_query"][copy] = copy.stop
    row["patch_index"][here] += np.where(document.patch < 0, 0, num_noised).astype(np.int32)
    return np.where(document.copies > 0, end + copied[1:], image_starts)


def collate(rows: Sequence[PackedBatch]) -> PackedBatch:
    """Concatenate rows into a batch with its target_index, whose denominators count these rows alone; see
    `with_counts`."""
    names = [field.name for field in fields(PackedBatch) if field.default is MISSING]
    batch = PackedBatch(**{name: torch.cat([getattr(row, name) for row in rows]) for name in names})
    batch.target_index = target_index(batch.labels)
    return with_counts(batch, batch.counts())


def target_index(labels_BS: Tensor) -> Tensor:
    """Where the text targets are in the flattened labels, int64 [R], made on the host.

    R is rounded up to a multiple of 128 by positions without a target, so that a device sees few shapes.
    """
    is_target = labels_BS.flatten() != IGNORED_LABEL
    index = torch.cat([is_target.nonzero(), (~is_target).nonzero()])[:, 0]
    num_targets = max(1, int(is_target.sum()))
    return index[: -(-num_targets // TARGETS_ALIGNMENT) * TARGETS_ALIGNMENT]


SLOT_FIELDS = ("latents", "noise", "t", "image_start", "image_size", "has_loss", "pixels", "has_pixels")
"""Fields of a PackedBatch with a dimension N of image slots, their second."""


def drop_unused_slots(batch: PackedBatch, max_patches: int) -> PackedBatch:
    """The batch without the last image slots that no row uses; of N, one of four numbers is kept.

    Few numbers, because memory is allocated and convolutions are chosen for each shape; at least one slot,
    because every parameter is to have a gradient. max_patches: P, of the largest size.
    """
    num_slots, num_used = batch.t.shape[1], int((batch.image_start >= 0).sum(1).max())
    quarter = -(-num_slots // 4)
    num_kept = quarter * max(1, -(-num_used // quarter))
    kept = {name: getattr(batch, name)[:, :num_kept].contiguous() for name in SLOT_FIELDS}
    # Clean patches are counted behind the noised ones of all slots.
    is_clean = batch.patch_index >= num_slots * max_patches
    index = batch.patch_index - is_clean.int() * ((num_slots - num_kept) * max_patches)
    return replace(batch, patch_index=index, **kept)


def with_counts(batch: PackedBatch, counts: Tensor) -> PackedBatch:
    """Set the losses' denominators: int64 [2], text targets and images of the whole global batch."""
    batch.num_text_targets, batch.num_images = counts.unbind()
    return batch
