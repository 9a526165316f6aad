"""Images of a shard as people see them: decoded from latents, or from the pixels that are kept."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from PIL import Image

from megafusion.data.augment import decode_pixels
from megafusion.data.document_format import StoredDocument
from megafusion.images.processor import postprocess_images, resize_and_crop
from megafusion.images.sizes import Size, nearest_size
from megafusion.sequence.document import Segment

if TYPE_CHECKING:  # the codec imports diffusers
    from megafusion.images.codec import ImageCodec


def first_images(documents: Iterable[StoredDocument]) -> list[Segment]:
    """The first image of each document that has one."""
    images = ([s for s in document.segments if s.kind != "tokens"] for document in documents)
    return [found[0] for found in images if found]


def decode(images: Sequence[Segment], codec: ImageCodec, sizes: Sequence[Size] = ()) -> list[Image.Image]:
    """Images, all of one kind, as PIL images: the means of latents decoded, or pixels.

    sizes: heights and widths in pixels. Pixels are cropped about the centre to the one nearest in aspect, as
    training does without augmentation; without sizes they are returned as kept.
    """
    if images[0].kind == "moments":
        device = codec.model.device
        means = (torch.tensor(image.data[:1], dtype=torch.float32, device=device) for image in images)
        return [shown for mean in means for shown in postprocess_images(codec.decode(mean))]
    kept = [decode_pixels(image.data) for image in images]
    if not sizes:
        return kept
    return [resize_and_crop(image, *sizes[nearest_size(image.height, image.width, sizes)]) for image in kept]
