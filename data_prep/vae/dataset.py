"""Pictures from WebDataset shards: a deterministic held-out part, a shuffled endless rest."""

import glob
import hashlib
import io
import random
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path

import torch
import webdataset
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from data_prep.vae.config import ImageDataConfig
from megafusion.errors import UserError
from megafusion.images.processor import preprocess_images

IMAGE_EXTENSIONS = ("webp", "png", "jpg", "jpeg")


def find_shards(config: ImageDataConfig) -> list[Path]:
    """The shards that the patterns name, sorted; UserError for a pattern that names none."""
    shards: set[str] = set()
    for pattern in config.shards:
        found = glob.glob(pattern, recursive=True)  # noqa: PTH207 (patterns may be absolute)
        if not found:
            raise UserError(f"data.shards: {pattern}: no such shard; build it or correct the path")
        shards.update(found)
    return [Path(name) for name in sorted(shards)]


def is_held_out(key: str, fraction: float) -> bool:
    """Whether a sample is for measuring: by a hash of its key up to the first "-", so by the concept."""
    group = key.partition("-")[0]
    draw = int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], "big") / 2**64
    return draw < fraction


def held_out_images(config: ImageDataConfig, shards: list[Path]) -> tuple[list[str], Tensor]:
    """Keys and pictures float [N, 3, H, W] in [-1, 1] of the held-out part, in the shards' order."""
    held_out = (s for s in _samples(shards) if is_held_out(s["__key__"], config.held_out_fraction))
    chosen = list(islice(held_out, config.max_held_out))
    if not chosen:
        raise UserError(
            f"data.held_out_fraction {config.held_out_fraction}: keeps no picture of "
            f"{', '.join(map(str, shards))}; raise it or add pictures"
        )
    images = [_image(s) for s in chosen]
    return [s["__key__"] for s in chosen], preprocess_images(images, config.image_size, config.image_size)


def training_batches(
    config: ImageDataConfig, shards: list[Path], batch_size: int, seed: int, num_skipped: int = 0
) -> Iterator[Tensor]:
    """Endless float [N, 3, H, W] in [-1, 1]; order and flips depend on `seed` alone.

    The first `num_skipped` batches are passed over without decoding, as a resumed run needs.
    """
    batch: list[Tensor] = []
    num_pictures_left_out = num_skipped * batch_size
    for epoch in count():
        rng = random.Random(f"{seed}/{epoch}")
        sample = None
        for sample in _shuffled(config, shards, rng):
            flip = config.horizontal_flip and rng.random() < 0.5
            if num_pictures_left_out:
                num_pictures_left_out -= 1
                continue
            picture = preprocess_images([_image(sample)], config.image_size, config.image_size)[0]
            batch.append(picture.flip(-1) if flip else picture)
            if len(batch) == batch_size:
                yield torch.stack(batch)
                batch = []
        if sample is None:
            raise UserError(f"data.shards: {', '.join(map(str, shards))}: no picture left to train on")


def hash_shards(shards: list[Path]) -> str:
    """sha256 of the shards' bytes, in order."""
    digest = hashlib.sha256()
    for shard in shards:
        with shard.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _shuffled(config: ImageDataConfig, shards: list[Path], rng: random.Random) -> Iterator[dict]:
    """One epoch of training samples: shards in random order, then a shuffle buffer."""
    order = rng.sample(shards, len(shards))
    samples = (s for s in _samples(order) if not is_held_out(s["__key__"], config.held_out_fraction))
    size = config.shuffle_buffer
    return webdataset.filters.shuffle(size, initial=size, rng=rng)(samples)


def _samples(shards: list[Path]) -> Iterator[dict]:
    """Samples of the shards in order; UserError naming a shard that cannot be read to its end."""
    for shard in shards:
        try:
            for sample in webdataset.WebDataset([str(shard)], shardshuffle=False, empty_check=False):
                if any(extension in sample for extension in IMAGE_EXTENSIONS):
                    yield sample
        except (OSError, EOFError, ValueError, webdataset.tariterators.tarfile.TarError) as error:
            raise UserError(f"{shard}: not readable as a tar shard; build it again ({error})") from error


def _image(sample: dict) -> Image.Image:
    extension = next(e for e in IMAGE_EXTENSIONS if e in sample)
    try:
        image = Image.open(io.BytesIO(sample[extension]))
        image.load()
    except (UnidentifiedImageError, OSError) as error:
        shard = sample.get("__url__", "shard")
        raise UserError(
            f"{shard}: {sample['__key__']}.{extension}: not a readable picture: {error}"
        ) from error
    return image
