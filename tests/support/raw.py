"""Raw inputs, made in the test: pictures, tars, and the bytes of what preprocessing made of them."""

import io
import multiprocessing
import os
import signal
import tarfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.config import PreprocessConfig
from data_prep.preprocess import preprocess
from tests.support.tars import add_members

NOT_SHARDS = {"inputs.json"}


def png(color: str = "red", size: tuple[int, int] = (40, 40), mode: str = "RGB") -> bytes:
    """A picture of one colour."""
    return encoded(Image.new(mode, size, color))


def drawing(seed: int, size: tuple[int, int] = (40, 40)) -> Image.Image:
    """A picture with shapes, unlike those of other seeds."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, form: str = "PNG", **options) -> bytes:
    """A picture's bytes."""
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def write_tar(path: Path, samples: dict[str, dict[str, bytes]]) -> Path:
    """A webdataset tar of members by key and suffix."""
    return write_members(path, [(f"{k}.{s}", c) for k, sample in samples.items() for s, c in sample.items()])


def write_members(path: Path, members: list[tuple[str, bytes] | tarfile.TarInfo]) -> Path:
    """A tar of any members."""
    with tarfile.open(path, "w") as archive:
        add_members(archive, members)
    return path


def shards_made(out: Path) -> int:
    """Shards anywhere below a folder."""
    found = [name for _, _, names in os.walk(out) for name in names]
    return sum(name.startswith("shard-") and name.endswith(".tar") for name in found)


def kill_in_the_middle(config: PreprocessConfig, moment: int, seconds: float) -> None:
    """Preprocess in another process; SIGKILL it so long after it has made so many shards."""
    run = multiprocessing.get_context("fork").Process(target=preprocess, args=(config,))
    run.start()
    while run.is_alive() and shards_made(config.out) < moment:
        time.sleep(0.001)
    time.sleep(seconds)
    run.kill()
    run.join()
    assert run.exitcode == -signal.SIGKILL


def made_files(folder: Path) -> dict[str, bytes]:
    """Every file of a folder of shards but the one that has times in it."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in NOT_SHARDS}
