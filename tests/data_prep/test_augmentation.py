"""Shifted and scaled copies: where they lie, what decides them, and the shards of them."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from data_prep.augmentation import Affine, CopiesConfig
from megafusion.data.manifest import load_manifest
from megafusion.data.reader import ShardFolder
from megafusion.errors import UserError
from megafusion.images.codec import ImageCodec
from megafusion.images.processor import preprocess_images
from tests.support.raw import png, write_tar

COPIES = {"copies": 3, "max_shift": 0.25, "scale": (0.5, 0.9), "seed": 1}


def square(side: int = 64, left: int = 24, top: int = 16, size: int = 16) -> Image.Image:
    """A black square on white."""
    image = Image.new("RGB", (side, side), "white")
    image.paste("black", (left, top, left + size, top + size))
    return image


def moments(image: Image.Image) -> tuple[float, np.ndarray]:
    """Area and centre (x, y) of what is dark, in pixels."""
    dark = 1 - np.asarray(image.convert("L"), float) / 255
    ys, xs = np.indices(dark.shape) + 0.5
    return dark.sum(), np.array([(dark * xs).sum(), (dark * ys).sum()]) / dark.sum()


@given(st.floats(0.5, 1.2), st.floats(-0.2, 0.2), st.floats(-0.2, 0.2))
def test_a_shift_and_a_scale_move_the_image_about_its_centre(scale, right, down):
    image = square()
    area, centre = moments(image)
    moved_area, moved_centre = moments(Affine(scale, right, down).apply(image))
    assert moved_area == pytest.approx(area * scale**2, rel=0.03)
    expected = 32 + scale * (centre - 32) + 64 * np.array([right, down])
    np.testing.assert_allclose(moved_centre, expected, atol=0.15)


def test_the_identity_keeps_every_pixel_and_what_is_uncovered_is_white():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 30, 3), dtype=np.uint8))
    assert np.array_equal(Affine(1.0, 0.0, 0.0).apply(image), image)
    black = Image.new("RGB", (40, 40))
    moved = np.asarray(Affine(0.5, 0.25, 0.0).apply(black))
    assert (moved[:, :16] == 255).all()
    assert (moved[14:26, 24:36] == 0).all()


def with_whole_border(affine: Affine, image: Image.Image) -> np.ndarray:
    """The same from the image with as much white around it as the moved one shows."""
    size, shift = np.array(image.size), np.array(affine[1:])
    begin = size / 2 - size * (0.5 + shift) / affine.scale
    end = begin + size / affine.scale
    border = math.ceil(max(0, *-begin, *(end - size)))
    around = ImageOps.expand(image, border, "white")
    return np.asarray(
        around.resize(image.size, Image.Resampling.LANCZOS, (*begin + border, *end + border)), int
    )


shifts = st.floats(-0.95, 0.95)


@settings(max_examples=60)
@given(st.floats(0.1, 2), shifts, shifts, st.sampled_from([(40, 30), (9, 30), (5, 4)]), st.integers(0, 99))
def test_a_border_that_is_cut_short_changes_nothing(scale, right, down, size, seed):
    """A level at most, because boxes have single precision."""
    pixels = np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    image, affine = Image.fromarray(pixels), Affine(scale, right, down)
    np.testing.assert_allclose(np.asarray(affine.apply(image), int), with_whole_border(affine, image), atol=1)


def test_the_border_of_a_small_scale_is_no_wider_than_the_image(monkeypatch):
    sizes, expand = [], ImageOps.expand

    def counted(*arguments) -> Image.Image:
        sizes.append(expand(*arguments).size)
        return expand(*arguments)

    monkeypatch.setattr(ImageOps, "expand", counted)
    black = Image.new("RGB", (200, 100))
    moved = np.asarray(Affine(0.1, 0.5, 0.25).apply(black))
    assert sizes == [(600, 500)]
    assert (moved[72:78, 193:200] < 5).all()
    assert (moved[:67] == 255).all()
    assert (moved[:, :187] == 255).all()
    assert np.asarray(Affine(0.1, 0.7, 0.0).apply(black)).min() == 255, "it lies outside"


def test_copies_depend_on_seed_key_and_number_alone():
    image, config = square(), CopiesConfig()
    assert config.augment(image, "a", 0) is image
    first = np.asarray(config.augment(image, "a", 1))
    assert np.array_equal(config.augment(image, "a", 1), first)
    others = [
        config.augment(image, "b", 1),
        config.augment(image, "a", 2),
        CopiesConfig(seed=1).augment(image, "a", 1),
    ]
    assert not any(np.array_equal(other, first) for other in others)


def test_each_pair_becomes_a_document_of_each_copy(make, tmp_path, vae_folder):
    content = {
        key: {"png": png(color), "txt": color.encode()} for key, color in (("a", "red"), ("b", "blue"))
    }
    tar = write_tar(tmp_path / "in.tar", content)
    make(images=(tar,))
    make(images=(tar,), augmentation=CopiesConfig(**COPIES), out=tmp_path / "copies")
    plain, folder = ShardFolder(tmp_path / "out/pairs"), ShardFolder(tmp_path / "copies/pairs")
    found = [folder.read(index) for index in range(len(folder))]
    assert [(d.metadata["key"], d.metadata["copy"]) for d in found] == [
        (k, n) for k in "ab" for n in range(3)
    ]
    np.testing.assert_allclose(found[3].segments[1].data, plain.read(1).segments[1].data, atol=2e-3)
    moved = CopiesConfig(**COPIES).augment(Image.new("RGB", (40, 40), "blue"), "b", 2)
    mean = ImageCodec.from_pretrained(vae_folder).encode(preprocess_images([moved], 32, 32))[0]
    np.testing.assert_allclose(found[5].segments[1].data[0], mean[0].numpy(), atol=2e-3)
    assert not np.allclose(found[4].segments[1].data, found[5].segments[1].data, atol=0.05)


def test_shards_of_copies_do_not_depend_on_workers_and_are_others_than_without(make, tmp_path):
    content = {f"{n}": {"png": png("red"), "txt": b"red"} for n in range(4)}
    tar = write_tar(tmp_path / "in.tar", content)
    settings = {"images": (tar,), "augmentation": CopiesConfig(**COPIES), "documents_per_shard": 2}
    make(**settings)
    make(**settings, out=tmp_path / "more", num_workers=2)
    shards = [sorted((tmp_path / out / "pairs").glob("*.tar")) for out in ("out", "more")]
    assert len(shards[0]) == 2
    assert [p.read_bytes() for p in shards[0]] == [p.read_bytes() for p in shards[1]]
    assert load_manifest(tmp_path / "out/pairs").num_documents == 12
    with pytest.raises(UserError, match=r"out/pairs: holds 12 documents .* other values of augmentation"):
        make(**settings | {"augmentation": None})


@pytest.mark.parametrize("scale", [(0.0, 1.0), (1.2, 0.8), (1.0, 11.0)])
def test_a_wrong_range_of_scales_is_refused(scale):
    with pytest.raises(ValueError, match="scale"):
        CopiesConfig(scale=scale)
