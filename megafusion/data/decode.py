"""Images of a shard as people see them: decoded from latents, or from the pixels that are kept."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageOps

from megafusion.data.augment import decode_pixels
from megafusion.data.document_format import StoredDocument
from megafusion.images.processor import postprocess_images
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
    if images[0].kind == "pixels":
        return [_fit(decode_pixels(image.data), sizes) for image in images]
    decoded: dict[int, Image.Image] = {}
    for shape in dict.fromkeys(image.data.shape for image in images):
        indices = [index for index, image in enumerate(images) if image.data.shape == shape]
        means = torch.from_numpy(np.stack([images[index].data[0] for index in indices])).float()
        decoded |= zip(indices, postprocess_images(codec.decode(means)), strict=True)
    return [decoded[index] for index in range(len(images))]


def _fit(image: Image.Image, sizes: Sequence[Size]) -> Image.Image:
    if not sizes:
        return image
    height, width = sizes[nearest_size(image.height, image.width, sizes)]
    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
