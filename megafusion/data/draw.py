"""What is random about a document: the order of its parts, whether its caption stays, latents and noise."""

from dataclasses import dataclass, replace

import numpy as np

from megafusion.data.config import DataConfig
from megafusion.data.shards import Manifest
from megafusion.sequence.document import FlatDocument, NoisedImage

# exp(x / 2) of every float16 x, by its bits: one rounding of a float64, so alike on every processor.
with np.errstate(over="ignore", invalid="ignore"):
    DEVIATION = np.exp(0.5 * np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float64)).astype(
        np.float32
    )


@dataclass(frozen=True)
class StoredImage:
    """An image before its noise is drawn: moments float16 [2, C, H, W], and the bound of its timestep."""

    moments: np.ndarray
    max_timestep: int


def toss_coins(
    segments: tuple[np.ndarray, ...],
    manifest: Manifest,
    config: DataConfig,
    num_timesteps: int,
    generator: np.random.Generator,
) -> list[np.ndarray | StoredImage]:
    """The parts of a document in the order that they are shown in, images not yet drawn.

    Of an interleaved document, which keeps its order, an image that opens it stands before all text.
    """
    image_first = min(num_timesteps, config.image_first_max_timestep)
    if manifest.kind != "pair":
        has_text = [any(s.ndim == 1 for s in segments[:place]) for place in range(len(segments))]
        return [
            s if s.ndim == 1 else StoredImage(s, num_timesteps if after_text else image_first)
            for s, after_text in zip(segments, has_text, strict=True)
        ]
    text, moments = segments
    if generator.random() >= config.caption_first:
        return [StoredImage(moments, image_first), text]
    image = StoredImage(moments, num_timesteps)
    return [image] if generator.random() < config.caption_dropout else [text, image]


def draw_images(document: FlatDocument, manifest: Manifest, generator: np.random.Generator) -> FlatDocument:
    """The document with a sample of each image's latents, its noise and its timestep.

    The generator must be the one that tossed the coins, and each image is drawn in its order.
    """
    images = tuple(_draw(image, manifest, generator) for image in document.images)
    return replace(document, images=images) if images else document


def _draw(image: StoredImage, manifest: Manifest, generator: np.random.Generator) -> NoisedImage:
    mean, log_variance = image.moments
    sample, noise = generator.standard_normal(image.moments.shape, np.float32)
    sample *= DEVIATION[log_variance.view(np.uint16)]
    sample += mean
    if manifest.latent_shift:
        sample -= np.float32(manifest.latent_shift)
    sample *= np.float32(manifest.latent_scale)
    return NoisedImage(sample, noise, int(generator.integers(image.max_timestep)))
