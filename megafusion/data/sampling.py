"""Samples what is random about a document: order of segments, caption dropout, crops, latents, noise, t."""

from dataclasses import replace

import numpy as np

from megafusion.data.config import DataConfig
from megafusion.data.document_format import AFTER_TEXT, GIVEN, StoredDocument
from megafusion.data.images import View, augment, image_size, sample_view
from megafusion.data.manifest import Manifest
from megafusion.images.sizes import nearest_size
from megafusion.objective.noise_process import NoiseProcess
from megafusion.sequence.document import FlatDocument, ImageSegment, Segment
from megafusion.sequence.packing import SequenceShape

# exp(x / 2) of every float16 x, by its bits: float64 rounded once, so the same on every processor.
with np.errstate(over="ignore", invalid="ignore"):
    STANDARD_DEVIATIONS = np.exp(
        0.5 * np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float64)
    ).astype(np.float32)


def sample_layout(
    stored: StoredDocument,
    manifest: Manifest,
    config: DataConfig,
    shape: SequenceShape,
    generator: np.random.Generator,
) -> list[Segment]:
    """The segments of a document in the order in which the model sees them, noise not yet sampled.

    An image without text before it has max_t data.image_first_max_t, unless its document continues another
    with text. Images of a document with given ones are cropped and mirrored alike, because they belong
    together. Raises BadImage for pixels that do not decode.
    """
    is_after_text, given = stored.metadata.get(AFTER_TEXT, False), stored.metadata.get(GIVEN, ())
    segments, view = [], None
    for segment in stored.segments:
        if segment.kind == "pixels" and not (given and view):
            view = sample_view(config, generator)
        segments.append(_sized(segment, shape, view))
    if manifest.kind == "pair":
        text, image = segments
        if generator.random() >= config.caption_first:
            segments = [image, text]
        else:
            is_after_text = True
            segments = [image] if generator.random() < config.caption_dropout else [text, image]
    ordered: list[Segment] = []
    num_images = 0
    for segment in segments:
        if isinstance(segment, ImageSegment):
            max_t = segment.max_t if is_after_text else config.image_first_max_t
            segment = replace(segment, max_t=max_t, is_given=num_images in given)
            num_images += 1
        else:
            is_after_text = True
        ordered.append(segment)
    return ordered


def _sized(segment: Segment, shape: SequenceShape, view: View | None) -> Segment:
    """A text unchanged; an image with the size of its latents, or pixels at the size nearest to theirs."""
    if segment.kind == "tokens":
        return segment
    if segment.kind == "moments" or segment.kind == "codes":
        return ImageSegment(segment.kind, segment.data, shape.sizes.index(segment.data.shape[-2:]))
    assert view is not None
    size = nearest_size(*image_size(segment.data), shape.sizes) if len(shape.sizes) > 1 else 0
    return ImageSegment("pixels", augment(segment.data, shape.image_sizes[size], view), size)


def sample_noise(
    document: FlatDocument,
    manifest: Manifest,
    config: DataConfig,
    shape: SequenceShape,
    noise_process: NoiseProcess,
    generator: np.random.Generator,
) -> FlatDocument:
    """The document with latents, noise and t of each image sampled, by the generator of `sample_layout`;
    images of codes have none."""
    if manifest.image_kind == "codes":
        return document
    images = []
    seed = generator.integers(2**63) if config.t_per == "document" else None
    for image in document.images:
        size = (2, shape.latent_channels, *shape.sizes[image.size])
        latents, noise = generator.standard_normal(size, np.float32)
        if image.kind == "moments":
            mean, log_variance = image.data
            latents *= STANDARD_DEVIATIONS[log_variance.view(np.uint16)]
            latents += mean
            if manifest.latent_shift:
                latents -= np.float32(manifest.latent_shift)
            latents *= np.float32(manifest.latent_scale)
        of_t = generator if seed is None else np.random.default_rng(seed)
        t = noise_process.sample_t(of_t, image.max_t)
        if image.is_given:
            noise, t = np.zeros_like(noise), 0.0
        images.append(replace(image, latents=latents, noise=noise, t=t))
    return replace(document, images=tuple(images))
