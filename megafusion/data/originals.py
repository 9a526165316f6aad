"""What an image of a shard looks like: decoded from its latents, or the picture that was kept."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageOps

from megafusion.autoencoder.codec import ImageCodec, to_pil
from megafusion.data.members import StoredDocument, segment_kind
from megafusion.data.pictures import open_picture


def first_images(documents: Sequence[StoredDocument]) -> list[np.ndarray | bytes]:
    """The first image of each document that has one, as it is stored."""
    images = ([s for s in document.segments if segment_kind(s) != "tokens"] for document in documents)
    return [found[0] for found in images if found]


def originals(
    images: Sequence[np.ndarray | bytes], codec: ImageCodec, size: tuple[int, int]
) -> list[Image.Image]:
    """Pictures of H x W pixels, all of one kind: of the means of latents, or the middle of those kept."""
    if isinstance(images[0], bytes):
        return [ImageOps.fit(open_picture(image), size[::-1], Image.Resampling.LANCZOS) for image in images]
    means = torch.from_numpy(np.stack([moments[0] for moments in images])).float()
    return to_pil(codec.decode(means.to(next(codec.model.parameters()).device)))
