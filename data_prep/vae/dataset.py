"""Images of webdataset tars: a deterministic held-out part, and endless shuffled training batches."""

import glob
import hashlib
import random
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path

import torch
import webdataset
from PIL import Image
from torch import Tensor

from data_prep.images import open_rgb
from data_prep.readers.records import BadRecord
from data_prep.readers.webdataset import NO_IMAGE, TarReader
from data_prep.vae.config import ImageDataConfig
from megafusion.errors import UserError
from megafusion.images.processor import preprocess_images

Sample = tuple[str, str, bytes]
"""Key, where it is for error messages, and encoded image."""


def find_shards(config: ImageDataConfig) -> list[Path]:
    """The shards that the patterns match, sorted; UserError for a pattern without a match."""
    shards: set[str] = set()
    for pattern in config.shards:
        found = glob.glob(pattern, recursive=True)  # noqa: PTH207 (patterns may be absolute)
        if not found:
            raise UserError(f"data.shards: {pattern}: no such shard; build it or correct the path")
        shards.update(found)
    return [Path(name) for name in sorted(shards)]


def is_held_out(key: str, fraction: float) -> bool:
    """Whether an image is held out, by a hash of its key up to the first "-", so by concept."""
    group = key.partition("-")[0]
    return int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], "big") / 2**64 < fraction


def held_out_images(config: ImageDataConfig, shards: list[Path]) -> tuple[list[str], Tensor]:
    """Keys and pixels, float [N, 3, H, W] in [-1, 1], of the held-out images, in the shards' order."""
    held_out = (s for s in _samples(shards) if is_held_out(s[0], config.held_out_fraction))
    chosen = list(islice(held_out, config.max_held_out))
    if not chosen:
        raise UserError(
            f"data.held_out_fraction {config.held_out_fraction}: holds out no image of "
            f"{', '.join(map(str, shards))}; raise it or add images"
        )
    images = [_decode(sample) for sample in chosen]
    return [key for key, _, _ in chosen], preprocess_images(images, config.image_size, config.image_size)


def training_batches(
    config: ImageDataConfig, shards: list[Path], batch_size: int, seed: int, num_skipped: int = 0
) -> Iterator[Tensor]:
    """Endless float [N, 3, H, W] in [-1, 1]; order and flips depend on `seed` alone.

    A resumed run skips its first `num_skipped` batches, without decoding them.
    """
    samples = islice(_training_samples(config, shards, seed), num_skipped * batch_size, None)
    while True:
        batch, flips = zip(*islice(samples, batch_size), strict=True)
        pixels = preprocess_images(list(map(_decode, batch)), config.image_size, config.image_size)
        yield torch.where(torch.tensor(flips)[:, None, None, None], pixels.flip(-1), pixels)


def hash_shards(shards: list[Path]) -> str:
    """sha256 of the shards' bytes, in order."""
    digest = hashlib.sha256()
    for shard in shards:
        with shard.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _training_samples(
    config: ImageDataConfig, shards: list[Path], seed: int
) -> Iterator[tuple[Sample, bool]]:
    """Endless training images, and whether to flip each: shards in random order, then a shuffle buffer."""
    for epoch in count():
        rng = random.Random(f"{seed}/{epoch}")
        order = rng.sample(shards, len(shards))
        samples = (s for s in _samples(order) if not is_held_out(s[0], config.held_out_fraction))
        sample, size = None, config.shuffle_buffer
        for sample in webdataset.filters.shuffle(size, initial=size, rng=rng)(samples):
            yield sample, config.horizontal_flip and rng.random() < 0.5
        if sample is None:
            raise UserError(f"data.shards: {', '.join(map(str, shards))}: no image left to train on")


def _samples(shards: list[Path]) -> Iterator[Sample]:
    """Images of the shards in order; UserError naming the first corrupt shard or invalid member."""
    for shard in shards:
        reader = TarReader(shard)
        for record in reader.records():
            if record.problem == NO_IMAGE:
                continue
            where = reader.where(record)
            if record.problem:
                raise UserError(f"{where}: {record.problem}")
            yield record.key, where, reader.read(record).image


def _decode(sample: Sample) -> Image.Image:
    _, where, content = sample
    try:
        return open_rgb(content)
    except BadRecord as error:
        raise UserError(f"{where}: {error.reason}; fix or remove it") from error
