"""Raw inputs for preprocessing: images and tars; killing it, and reading its output."""

import io
import multiprocessing
import os
import signal
import struct
import tarfile
import time
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.config import PreprocessConfig
from data_prep.preprocess import preprocess
from tests.support.tars import add_members

NOT_SHARDS = {"inputs.json"}


def png(color: str = "red", size: tuple[int, int] = (40, 40), mode: str = "RGB") -> bytes:
    """An encoded image of one color."""
    return encoded(Image.new(mode, size, color))


def drawing(seed: int, size: tuple[int, int] = (40, 40)) -> Image.Image:
    """An image of random shapes, different for each seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, form: str = "PNG", **options) -> bytes:
    """An encoded image."""
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def png_with(name: bytes, content: bytes, image: Image.Image) -> bytes:
    """A PNG with a chunk behind its header."""
    plain, body = encoded(image), name + content
    return (
        plain[:33] + struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body)) + plain[33:]
    )


def strange_images() -> dict[str, bytes]:
    """Valid images of 40 x 40, of one color, whose metadata or numbers Pillow refuses or clips."""
    lime, text = Image.new("RGB", (40, 40), "lime"), zlib.compress(b"x" * 3_000_000)
    black = Image.fromarray(np.zeros((40, 40), np.uint16))
    return {
        "3 MB of text": png_with(b"zTXt", b"k\0\0" + text, lime),
        "rubbish EXIF": png_with(b"eXIf", b"rubbish", lime),
        "rubbish EXIF in WebP": encoded(lime, "WEBP", lossless=True, exif=b"Exif\0\0rubbish"),
        "float TIFF": encoded(Image.fromarray(np.full((40, 40), 0.5, np.float32)), "TIFF"),
        "transparent 16-bit grey": png_with(b"tRNS", b"\0\0", black),
    }


def write_tar(path: Path, samples: dict[str, dict[str, bytes]]) -> Path:
    """A webdataset tar of members by key and suffix."""
    return write_members(path, [(f"{k}.{s}", c) for k, sample in samples.items() for s, c in sample.items()])


def write_members(path: Path, members: list[tuple[str, bytes] | tarfile.TarInfo]) -> Path:
    """A tar of any members."""
    with tarfile.open(path, "w") as archive:
        add_members(archive, members)
    return path


def shards_made(out: Path) -> int:
    """Number of shards anywhere below a folder."""
    found = [name for _, _, names in os.walk(out) for name in names]
    return sum(name.startswith("shard-") and name.endswith(".tar") for name in found)


def kill_in_the_middle(config: PreprocessConfig, moment: int, seconds: float) -> None:
    """Preprocess in another process; SIGKILL it some seconds after it has written `moment` shards."""
    run = multiprocessing.get_context("fork").Process(target=preprocess, args=(config,))
    run.start()
    while run.is_alive() and shards_made(config.out) < moment:
        time.sleep(0.001)
    time.sleep(seconds)
    run.kill()
    run.join()
    assert run.exitcode == -signal.SIGKILL


def made_files(folder: Path) -> dict[str, bytes]:
    """Every file of a folder of shards except the one with modification times."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in NOT_SHARDS}
