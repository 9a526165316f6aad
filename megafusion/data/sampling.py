"""What is random about a document: the order of its parts, whether its caption stays, latents and noise."""

from dataclasses import dataclass, replace

import numpy as np

from megafusion.data.augment import picture_size, show_picture
from megafusion.data.config import DataConfig
from megafusion.data.document_format import segment_kind
from megafusion.data.manifest import Manifest
from megafusion.images.sizes import nearest_size
from megafusion.objective.noise_process import NoiseProcess
from megafusion.sequence.document import FlatDocument, NoisedImage
from megafusion.sequence.packing import SequenceShape

# exp(x / 2) of every float16 x, by its bits: one rounding of a float64, so alike on every processor.
with np.errstate(over="ignore", invalid="ignore"):
    DEVIATION = np.exp(0.5 * np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float64)).astype(
        np.float32
    )


@dataclass(frozen=True)
class StoredImage:
    """An image before its noise is drawn: moments float16 [2, C, H, W] or a picture uint8 [3, H, W], and the
    bound of its t; and the index of its size among the row's."""

    content: np.ndarray
    max_t: float
    size: int = 0


def sample_layout(
    segments: tuple[np.ndarray | bytes, ...],
    manifest: Manifest,
    config: DataConfig,
    shape: SequenceShape,
    generator: np.random.Generator,
    is_after_text: bool = False,
) -> list[np.ndarray | StoredImage]:
    """The parts of a document in the order that they are shown in, images not yet drawn.

    Of an interleaved document, which keeps its order, an image that opens it stands before all text; not so
    where it is a part of one (is_after_text). Raises BadBytes where a picture cannot be opened.
    """
    sizes = [_size(segment, shape) for segment in segments]
    parts = [
        show_picture(s, shape.image_sizes[size], config, generator) if isinstance(s, bytes) else s
        for s, size in zip(segments, sizes, strict=True)
    ]
    if manifest.kind != "pair":
        is_text = [segment_kind(segment) == "tokens" for segment in segments]
        bounds = (config.image_first_max_t, 1.0)
        return [
            part if here else StoredImage(part, bounds[is_after_text or any(is_text[:place])], size)
            for place, (part, size, here) in enumerate(zip(parts, sizes, is_text, strict=True))
        ]
    text, content = parts
    if generator.random() >= config.caption_first:
        return [StoredImage(content, config.image_first_max_t, sizes[1]), text]
    image = StoredImage(content, 1.0, sizes[1])
    return [image] if generator.random() < config.caption_dropout else [text, image]


def _size(segment: np.ndarray | bytes, shape: SequenceShape) -> int:
    """Index of an image's size: that of its latents, or the nearest to a picture. 0 for a text."""
    if isinstance(segment, bytes):
        return nearest_size(*picture_size(segment), shape.sizes) if len(shape.sizes) > 1 else 0
    return shape.sizes.index(segment.shape[2:]) if segment.ndim > 1 else 0


def sample_noise(
    document: FlatDocument,
    manifest: Manifest,
    shape: SequenceShape,
    noise_process: NoiseProcess,
    generator: np.random.Generator,
) -> FlatDocument:
    """The document with a sample of each image's latents, its noise and its t.

    The generator must be the one that tossed the coins, and each image is drawn in its order. A picture's
    latents are for now what its posterior's deviation is to be multiplied by.
    """
    images = tuple(_draw(image, manifest, shape, noise_process, generator) for image in document.images)
    return replace(document, images=images) if images else document


def _draw(
    image: StoredImage,
    manifest: Manifest,
    shape: SequenceShape,
    noise_process: NoiseProcess,
    generator: np.random.Generator,
) -> NoisedImage:
    size = (2, shape.latent_channels, *shape.sizes[image.size])
    sample, noise = generator.standard_normal(size, np.float32)
    if manifest.images == "pictures":
        t = noise_process.sample_t(generator, image.max_t)
        return NoisedImage(sample, noise, t, image.content, image.size)
    mean, log_variance = image.content
    sample *= DEVIATION[log_variance.view(np.uint16)]
    sample += mean
    if manifest.latent_shift:
        sample -= np.float32(manifest.latent_shift)
    sample *= np.float32(manifest.latent_scale)
    return NoisedImage(sample, noise, noise_process.sample_t(generator, image.max_t), size=image.size)
