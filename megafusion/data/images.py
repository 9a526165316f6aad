"""Images of shards: as training reads them (pixels are cropped and mirrored), and as people see them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from PIL import Image

from megafusion.data.config import DataConfig
from megafusion.data.document_format import StoredDocument
from megafusion.images.processor import postprocess_images, resize_and_crop
from megafusion.images.reader import open_image
from megafusion.images.sizes import Size, nearest_size
from megafusion.sequence.document import Segment

if TYPE_CHECKING:  # the codec imports diffusers
    from megafusion.images.codec import ImageCodec


def decode_pixels(content: bytes) -> Image.Image:
    """An image of a shard, which is WebP. Raises BadImage if it does not decode or is too large."""
    return open_image(content, lambda image: image.convert("RGB"), ("WEBP",))


def image_size(content: bytes) -> tuple[int, int]:
    """Height and width in pixels, from the header of an image of a shard. Raises BadImage."""
    return open_image(content, lambda image: (image.height, image.width), ("WEBP",))


class View(NamedTuple):
    """The part of an image in training: the share of its sides that a crop keeps, where the crop lies, from 0
    at the left and top to 1, and whether it is mirrored left to right."""

    share: float
    x: float
    y: float
    is_mirrored: bool


def sample_view(config: DataConfig, generator: np.random.Generator) -> View:
    """The centre; if `config.crop` is below 1, a random crop that keeps at least that share of the sides.

    Mirrored with probability `config.flip`. Without either nothing is sampled, so the rest of the document is
    as it is with stored latents.
    """
    scale, x, y = generator.random(3) if config.crop < 1 else (1.0, 0.5, 0.5)
    is_mirrored = bool(config.flip and generator.random() < config.flip)
    return View(config.crop + (1 - config.crop) * scale, x, y, is_mirrored)


def augment(content: bytes, size: tuple[int, int], view: View) -> np.ndarray:
    """Decode an image of a shard, crop it, resize it to (height, width) and mirror it: uint8 [3, H, W].

    The crop has the aspect of `size`. Raises BadImage.
    """
    height, width = size
    image = decode_pixels(content)
    fit = min(image.width / width, image.height / height) * view.share
    left, top = view.x * (image.width - fit * width), view.y * (image.height - fit * height)
    box = (left, top, left + fit * width, top + fit * height)
    resized = image.resize((width, height), Image.Resampling.LANCZOS, box=box)
    if view.is_mirrored:
        resized = resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.ascontiguousarray(np.asarray(resized).transpose(2, 0, 1))


def first_images(documents: Iterable[StoredDocument]) -> list[Segment]:
    """The first image of each document that has one."""
    images = ([s for s in document.segments if s.kind != "tokens"] for document in documents)
    return [found[0] for found in images if found]


def decode(images: Sequence[Segment], codec: ImageCodec, sizes: Sequence[Size] = ()) -> list[Image.Image]:
    """Images, all of one kind, as PIL images: the means of latents decoded, codes decoded, or pixels.

    sizes: heights and widths in pixels. Pixels are cropped about the centre to the one nearest in aspect, as
    training does without augmentation; without sizes they are returned as kept.
    """
    if images[0].kind == "moments":
        device = codec.model.device
        means = (torch.tensor(image.data[:1], dtype=torch.float32, device=device) for image in images)
        return [shown for mean in means for shown in postprocess_images(codec.decode(mean))]
    if images[0].kind == "codes":
        return [shown for image in images for shown in codec.decode_images(torch.tensor(image.data[None]))]
    kept = [decode_pixels(image.data) for image in images]
    if not sizes:
        return kept
    return [resize_and_crop(image, *sizes[nearest_size(image.height, image.width, sizes)]) for image in kept]
