"""Sources that keep pixels: augmented and encoded in training, the same at any topology."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megafusion.config import parse_config
from megafusion.data.config import DataConfig
from megafusion.data.images import View, augment, sample_view
from megafusion.errors import UserError
from megafusion.images.reader import BadImage
from megafusion.telemetry.metrics_file import read_metrics
from megafusion.train.config import RunConfig
from megafusion.train.loop import train
from tests.support.marks import full
from tests.support.rows import digest, stored, stream_of, write_pairs, write_shards
from tests.support.workers import run_workers

CENTRE = View(1.0, 0.5, 0.5, is_mirrored=False)


def webp(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", lossless=True)
    return buffer.getvalue()


def ramp(width: int, height: int) -> Image.Image:
    """An image whose red is the column and whose green is the row."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(width), np.arange(height)[:, None]
    return Image.fromarray(pixels)


def write_pixels(folder: Path, num: int, tokenizer: str = "t") -> Path:
    random = np.random.default_rng(0)

    def documents():
        for i in range(num):
            shape = (int(random.integers(32, 60)), int(random.integers(32, 60)), 3)
            image = Image.fromarray(random.integers(0, 256, shape, np.uint8))
            tokens = random.integers(3, 60, 5).astype(np.int32)
            yield stored({"key": f"k{i}", "caption": f"image {i}"}, tokens, webp(image))

    fields = {"kind": "pair", "images": "pictures", "tokenizer_sha256": tokenizer, "provenance": {}}
    write_shards(folder, documents(), 16, **fields)
    return folder


def options(**values) -> DataConfig:
    some = {"sources": {"a": {"path": "p"}}, "tokenizer": "t", "vae": "v", "sequence_length": 64}
    return parse_config(DataConfig, some | {"images_per_row": 1, "num_streams": 1} | values, "test")


def test_without_random_crops_the_crop_is_centred():
    shown = augment(webp(ramp(100, 60)), (60, 60), sample_view(options(), np.random.default_rng(0)))
    assert shown.shape == (3, 60, 60)
    assert shown[0, 0].tolist() == list(range(20, 80))
    assert shown[1, :, 0].tolist() == list(range(60))


def test_crops_stay_inside_and_keep_the_minimum_share():
    generator, sides = np.random.default_rng(0), []
    for _ in range(200):
        shown = augment(webp(ramp(100, 60)), (30, 30), sample_view(options(crop=0.5), generator)).astype(int)
        across, down = np.ptp(shown[0, 0]), np.ptp(shown[1, :, 0])
        assert abs(across - down) <= 2  # square, as the size is
        sides.append(across)
    assert 27 <= min(sides) <= 31
    assert max(sides) >= 55


def test_images_are_mirrored_with_the_probability_of_flip():
    generator, content = np.random.default_rng(0), webp(ramp(40, 40))
    shown = [augment(content, (40, 40), sample_view(options(flip=0.3), generator)) for _ in range(300)]
    mirrored = sum(int(image[0, 0, 0]) == 39 for image in shown)
    assert 65 <= mirrored <= 115


@pytest.mark.parametrize(
    "content",
    [b"", b"RIFF\x10\0\0\0WEBPVP8 ", webp(ramp(40, 40))[:40], Image.new("L", (2, 2)).tobytes()],
    ids=["empty", "header", "truncated", "not an image"],
)
def test_bytes_that_do_not_decode_are_corrupt(content):
    with pytest.raises(BadImage, match="does not decode"):
        augment(content, (8, 8), CENTRE)


def test_an_image_of_another_format_is_corrupt():
    buffer = io.BytesIO()
    ramp(8, 8).save(buffer, "PNG")
    with pytest.raises(BadImage, match="does not decode"):
        augment(buffer.getvalue(), (8, 8), CENTRE)


def test_a_decompression_bomb_is_corrupt_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(BadImage, match="too many pixels"):
        augment(webp(ramp(40, 40)), (8, 8), CENTRE)


def test_rows_are_the_same_at_any_split_and_beside_latents(tmp_path):
    sources = {
        "pixels": (write_pixels(tmp_path / "pixels", 60), 1.0),
        "latents": (write_pairs(tmp_path / "latents", 60), 1.0),
    }
    changes = {"pixels_per_latent": 4, "crop": 0.7, "flip": 0.5}
    whole = stream_of(sources, range(4), 4, num_streams=4, **changes)
    halves = [
        stream_of(sources, rows, 4, num_streams=4, num_workers=n, **changes)
        for rows, n in ((range(2), 0), (range(2, 4), 1))
    ]
    with halves[0], halves[1]:
        for _ in range(8):
            batch = whole.next()
            assert digest(batch) == [row for half in halves for row in digest(half.next())]
    has_pixels = torch.cat([micro.has_pixels for micro in batch])
    used = torch.cat([micro.image_start >= 0 for micro in batch])
    assert has_pixels.any()
    assert (used & ~has_pixels).any()
    assert not (has_pixels & ~used).any()


def test_a_corrupt_image_is_skipped_and_counted(tmp_path):
    folder = write_pixels(tmp_path / "pixels", 200)
    for path in folder.glob("*.tar"):
        content = bytearray(path.read_bytes())
        at = content.index(b"RIFF")
        content[at : at + 4] = b"riff"
        path.write_bytes(content)
    sources = {"pixels": (folder, 1.0)}
    with pytest.raises(UserError, match=r"document \d+: not readable \(image does not decode as WEBP\)"):
        [stream_of(sources, range(1), 1, pixels_per_latent=4).next() for _ in range(40)]
    stream = stream_of(sources, range(1), 1, pixels_per_latent=4, on_error="skip", max_skip_rate=0.1)
    [stream.next() for _ in range(60)]
    assert sum(stream.state_dict()["streams"]["0"]["skipped"].values()) > 5


@pytest.fixture
def pixel_run(run_values, tokenizer, tmp_path) -> dict:
    folder = write_pixels(tmp_path / "pixels", 40, tokenizer.hash)
    run_values["data"]["sources"] = {"pixels": {"path": str(folder), "weight": 1.0}}
    run_values["data"] |= {"crop": 0.8, "flip": 0.5}
    run_values["train"]["num_steps"] = 4
    return run_values


def run(values: dict) -> None:
    train(parse_config(RunConfig, values, "test"))


def losses(values: dict) -> list[float]:
    return [line[name] for line in read_metrics(Path(values["out"])) for name in ("text_loss", "image_loss")]


# A tensor rank encodes its share of the images, which the other degrees do not divide.
@pytest.mark.parametrize("parallel", full({"tensor": 2}, {}, {"pipeline": 2}))
def test_a_run_over_pixels_is_the_same_on_two_ranks(pixel_run, tmp_path, parallel):
    run_workers(run, 1, pixel_run)
    other = pixel_run | {"out": str(tmp_path / "other"), "parallel": parallel}
    run_workers(run, 2, other)
    assert losses(other) == pytest.approx(losses(pixel_run), rel=1e-5)


def test_pixels_and_their_latents_give_the_same_losses(pixel_run, codec, tokenizer, tmp_path):
    """Without augmentation, encoded pixels equal the latents that preprocessing stores."""
    from megafusion.data.reader import ShardFolder

    kept = ShardFolder(Path(pixel_run["data"]["sources"]["pixels"]["path"]))
    documents = []
    for document in map(kept.read, range(len(kept))):
        shown = augment(document.segments[1].data, (32, 32), CENTRE)
        moments = torch.stack(codec.encode(torch.from_numpy(shown)[None].float() / 127.5 - 1), 1)[0]
        text = document.segments[0].data
        documents.append(stored(document.metadata, text, moments.half().numpy()))
    fields = {"kind": "pair", "tokenizer_sha256": tokenizer.hash, "provenance": {}}
    fields |= {"vae_sha256": codec.hash, "latent_shape": (4, 8, 8)}
    fields |= {"latent_scale": codec.scaling_factor, "latent_shift": codec.shift_factor}
    write_shards(tmp_path / "latents", documents, 16, **fields)
    pixel_run["data"] |= {"crop": 1.0, "flip": 0.0}
    run_workers(run, 1, pixel_run)
    other = pixel_run | {"out": str(tmp_path / "other")}
    other["data"] = other["data"] | {"sources": {"pixels": {"path": str(tmp_path / "latents")}}}
    run_workers(run, 1, other)
    assert losses(other) == pytest.approx(losses(pixel_run), rel=1e-3)
