"""What an image of a shard looks like: decoded from its latents, or the picture that was kept."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageOps

from megafusion.autoencoder.codec import ImageCodec, to_pil
from megafusion.data.members import StoredDocument, segment_kind
from megafusion.data.pictures import open_picture


def first_image(document: StoredDocument) -> np.ndarray | bytes:
    """A document's first image, as it is stored."""
    return next(segment for segment in document.segments if segment_kind(segment) != "tokens")


def originals(
    images: Sequence[np.ndarray | bytes], codec: ImageCodec, size: tuple[int, int]
) -> list[Image.Image]:
    """Pictures of H x W pixels, all of one kind: of the means of latents, or the middle of those kept."""
    if isinstance(images[0], bytes):
        return [ImageOps.fit(open_picture(image), size[::-1], Image.Resampling.LANCZOS) for image in images]
    means = torch.from_numpy(np.stack([moments[0] for moments in images])).float()
    return to_pil(codec.decode(means.to(next(codec.model.parameters()).device)))
