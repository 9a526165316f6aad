"""What an image of a shard looks like: decoded from its latents, or the picture that was kept."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageOps

from megafusion.data.augment import open_picture
from megafusion.data.document_format import StoredDocument, segment_kind
from megafusion.images.codec import ImageCodec
from megafusion.images.processor import postprocess_images
from megafusion.images.sizes import Size, nearest_size


def first_images(documents: Sequence[StoredDocument]) -> list[np.ndarray | bytes]:
    """The first image of each document that has one, as it is stored."""
    images = ([s for s in document.segments if segment_kind(s) != "tokens"] for document in documents)
    return [found[0] for found in images if found]


def originals(
    images: Sequence[np.ndarray | bytes], codec: ImageCodec, sizes: Sequence[Size] = ()
) -> list[Image.Image]:
    """Pictures, all of one kind: of the means of latents, each of its own size, or as they are kept.

    sizes: heights and widths in pixels; of pictures that are kept, what a run shows of them without chance,
    the middle at the size that is nearest in aspect.
    """
    if isinstance(images[0], bytes):
        return [_middle(open_picture(image), sizes) for image in images]
    pictures: dict[int, Image.Image] = {}
    for shape in dict.fromkeys(moments.shape for moments in images):
        own = [number for number, moments in enumerate(images) if moments.shape == shape]
        means = torch.from_numpy(np.stack([images[number][0] for number in own])).float()
        decoded = postprocess_images(codec.decode(means.to(codec.model.device)))
        pictures |= zip(own, decoded, strict=True)
    return [pictures[number] for number in range(len(images))]


def _middle(picture: Image.Image, sizes: Sequence[Size]) -> Image.Image:
    if not sizes:
        return picture
    height, width = sizes[nearest_size(picture.height, picture.width, sizes)]
    return ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)
