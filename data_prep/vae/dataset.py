"""Images of an autoencoder's training: a deterministic held-out part, and endless shuffled batches."""

import hashlib
import random
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import count, islice
from pathlib import Path
from typing import NamedTuple

import torch
import webdataset
from PIL import Image
from torch import Tensor

from data_prep.augmentation import Affine, sample_affine
from data_prep.images import open_rgb
from data_prep.readers.image_folder import ImageFolderReader
from data_prep.readers.parquet import ParquetReader, image_bytes
from data_prep.readers.records import BadRecord, Dropped, RawPair, Reader, Record
from data_prep.readers.splits import Inputs, InputSplit
from data_prep.readers.webdataset import NO_IMAGE, TarReader
from data_prep.vae.config import ImageDataConfig
from megafusion.errors import UserError
from megafusion.images.processor import preprocess_images

Sample = tuple[str, str, bytes]
"""Key, where it is for error messages, and encoded image."""


def find_images(config: ImageDataConfig, own: Sequence[Path] = ()) -> Inputs:
    """The images' files, except those in folders that the command writes. UserError for what is missing."""
    return Inputs("pair", config.images, own, image_column=config.image_column)


class Position(NamedTuple):
    """Where a training stands in its images: the epoch, and how many of its images were used."""

    epoch: int
    num_used: int


BEGINNING = Position(0, 0)


def is_held_out(key: str, config: ImageDataConfig) -> bool:
    """Whether an image is held out, by a hash of its key, or of what stands before the separator."""
    group, fraction = key, config.held_out_fraction
    if config.group_separator:
        group = key.partition(config.group_separator)[0]
    return int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], "big") / 2**64 < fraction


def held_out_images(config: ImageDataConfig, splits: list[InputSplit]) -> tuple[list[str], Tensor]:
    """Keys and pixels, float [N, 3, H, W] in [-1, 1], of the held-out images, in the inputs' order."""
    held_out = (s for s in _samples(config, splits) if is_held_out(s[0], config))
    chosen = list(islice(held_out, config.max_held_out))
    if not chosen:
        raise UserError(
            f"data.held_out_fraction {config.held_out_fraction}: holds out no image of "
            f"{', '.join(map(str, config.images))}; raise it or add images{_of_groups(config)}"
        )
    images = [_decode(sample) for sample in chosen]
    return [key for key, _, _ in chosen], preprocess_images(images, config.image_size, config.image_size)


def training_batches(
    config: ImageDataConfig,
    splits: list[InputSplit],
    batch_size: int,
    seed: int,
    start: Position = BEGINNING,
) -> Iterator[tuple[Tensor, Position]]:
    """Endless float [N, 3, H, W] in [-1, 1], each with the position after it; a resumed run starts there.

    Order and flips depend on `seed` alone. Images of the first epoch before `start` are read, not decoded.
    """
    samples = islice(_training_samples(config, splits, seed, start.epoch), start.num_used, None)
    while True:
        batch, flips, affines, positions = zip(*islice(samples, batch_size), strict=True)
        images = [
            affine.apply(_decode(sample)) if affine else _decode(sample)
            for sample, affine in zip(batch, affines, strict=True)
        ]
        pixels = preprocess_images(images, config.image_size, config.image_size)
        flipped = torch.where(torch.tensor(flips)[:, None, None, None], pixels.flip(-1), pixels)
        yield flipped, positions[-1]


def hash_files(splits: list[InputSplit]) -> str:
    """sha256 of the bytes of the files, in order."""
    digest = hashlib.sha256()
    for path in dict.fromkeys(path for split in splits for path in split.files):
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _training_samples(
    config: ImageDataConfig, splits: list[InputSplit], seed: int, first_epoch: int
) -> Iterator[tuple[Sample, bool, Affine | None, Position]]:
    """Endless training images, whether to flip each, how to shift and scale it, and the position after it.

    The splits are in random order, and then in a shuffle buffer, anew each epoch.
    """
    for epoch in count(first_epoch):
        rng = random.Random(f"{seed}/{epoch}")
        order = rng.sample(splits, len(splits))
        samples = (s for s in _samples(config, order) if not is_held_out(s[0], config))
        num_used, size = 0, config.shuffle_buffer
        for sample in webdataset.filters.shuffle(size, initial=size, rng=rng)(samples):
            num_used += 1
            flip = config.horizontal_flip and rng.random() < 0.5
            affine = sample_affine(config.augmentation, rng) if config.augmentation else None
            yield sample, flip, affine, Position(epoch, num_used)
        if not num_used:
            raise UserError(
                f"data.images: {', '.join(map(str, config.images))}: no image left to train on; lower "
                f"data.held_out_fraction or add images{_of_groups(config)}"
            )


def _of_groups(config: ImageDataConfig) -> str:
    """Advice where images are held out in groups, which may be few."""
    separator = config.group_separator
    return f", or set data.group_separator: '' in place of {separator!r}" if separator else ""


class _ParquetImages(ParquetReader):
    """Reads a parquet column of images, which needs no captions."""

    def read(self, record: Record) -> RawPair:
        (image,) = self.row(record).values()
        return RawPair(record.key, image_bytes(image), None, {})


def _samples(config: ImageDataConfig, splits: list[InputSplit]) -> Iterator[Sample]:
    """Images of the splits in order; UserError naming the first corrupt file or invalid record."""
    for split in splits:
        where = str(split.files[0])
        try:
            reader = _open(config, split)
            for record in reader.records(*split.span):
                where = reader.where(record)
                if record.problem not in (None, NO_IMAGE):
                    raise BadRecord(record.problem)
                with suppress(Dropped):
                    if not record.problem:
                        yield record.key, where, reader.read(record).image
        except BadRecord as error:
            raise UserError(f"{where}: {error.reason}; fix or remove it") from error


def _open(config: ImageDataConfig, split: InputSplit) -> Reader:
    if split.folder:
        return ImageFolderReader(split.folder, split.images)
    if split.form == "parquet":
        return _ParquetImages(split.files[0], {"image_column": config.image_column})
    return TarReader(split.files[0])


def _decode(sample: Sample) -> Image.Image:
    _, where, content = sample
    try:
        return open_rgb(content)
    except BadRecord as error:
        raise UserError(f"{where}: {error.reason}; fix or remove it") from error
