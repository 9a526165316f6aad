"""Records that filters drop, counted by reason; duplicates do not depend on the number of workers."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_prep.config import FilterConfig
from data_prep.filters import Deduplicator, RecordInfo
from megafusion.data.reader import ShardFolder
from tests.support.raw import drawing, encoded, png, write_tar


def kept_keys(folder) -> list[str]:
    shards = ShardFolder(folder)
    return [shards.read(document).metadata["key"] for document in range(len(shards))]


def scores(**values) -> bytes:
    return json.dumps(values).encode()


def test_each_filter_drops_and_counts_its_records(make, tmp_path):
    images = {
        "good": {"png": png(size=(40, 40)), "txt": b"four", "json": scores(beauty=6, risk=0.1)},
        "edges": {"png": png(size=(20, 60)), "txt": b"ninechars", "json": scores(beauty=5.0, risk=0.5)},
        "small": {"png": png(size=(19, 40)), "txt": b"four", "json": scores(beauty=6, risk=0.1)},
        "long": {"png": png(size=(20, 61)), "txt": b"four", "json": scores(beauty=6, risk=0.1)},
        "terse": {"png": png(size=(40, 40)), "txt": b"abc", "json": scores(beauty=6, risk=0.1)},
        "wordy": {"png": png(size=(40, 40)), "txt": b"tencharact", "json": scores(beauty=6, risk=0.1)},
        "ugly": {"png": png(size=(40, 40)), "txt": b"four", "json": scores(beauty=4.9, risk=0.1)},
        "risky": {"png": png(size=(40, 40)), "txt": b"four", "json": scores(beauty=6, risk=0.6)},
        "unknown": {"png": png(size=(40, 40)), "txt": b"four", "json": scores(beauty="6", risk=0.1)},
    }
    filters = {
        "min_side": 20,
        "max_aspect": 3.0,
        "min_caption": 4,
        "max_caption": 9,
        "scores": {"beauty": {"min": 5.0}, "risk": {"max": 0.5}},
    }
    (made,) = make(images=(write_tar(tmp_path / "in.tar", images),), filters=filters)
    assert kept_keys(tmp_path / "out/pairs") == ["good", "edges"]
    report = json.loads((tmp_path / "out/pairs/report.json").read_text())
    assert report["dropped"] == {
        "aspect ratio above filters.max_aspect": 1,
        "caption longer than filters.max_caption": 1,
        "caption shorter than filters.min_caption": 1,
        "image smaller than filters.min_side": 1,
        "score beauty is not a number": 1,
        "score beauty out of range": 1,
        "score risk out of range": 1,
    }
    assert report["bad"] == {}
    assert (report["inputs"], report["kept"], report["images"]) == (9, 2, 2)
    assert report["tokens"] == made.num_tokens
    assert report["images_by_shorter_side"] == {"16 to 31": 1, "32 to 63": 1}
    assert "in.tar, ugly" in report["examples"]["score beauty out of range"][0]


@pytest.fixture
def lookalikes(tmp_path):
    """Three tars: an image, its bytes again, the same image resized and compressed, and others."""
    again = encoded(drawing(1, (80, 80)), "JPEG", quality=60)
    one, two, three = ({"png": encoded(drawing(n)), "txt": b"x"} for n in (1, 2, 3))
    tars = [
        {"a": one, "b": two},
        {"c": one | {"txt": b"other words"}, "d": {"jpg": again, "txt": b"x"}},
        {"e": three, "f": two},
    ]
    return tuple(write_tar(tmp_path / f"{i}.tar", samples) for i, samples in enumerate(tars))


@pytest.mark.parametrize(
    ("duplicates", "expected"), [("keep", "abcdef"), ("exact", "abde"), ("perceptual", "abe")]
)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_first_of_duplicates_in_input_order_is_kept(
    make, tmp_path, lookalikes, duplicates, expected, num_workers
):
    filters = {"duplicates": duplicates, "max_distance": 2}
    make(images=lookalikes, filters=filters, num_workers=num_workers)
    assert "".join(kept_keys(tmp_path / "out/pairs")) == expected
    report = json.loads((tmp_path / "out/pairs/report.json").read_text())
    assert sum(report["dropped"].values()) == 6 - len(expected)


def test_equal_texts_are_duplicates(make, tmp_path):
    (tmp_path / "t.txt").write_text("one\ntwo\n one \n")
    (made,) = make(texts=(tmp_path / "t.txt",), filters={"duplicates": "exact"})
    assert made.num_documents == 2


@given(
    phashes=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=8),
    flips=st.lists(st.tuples(st.integers(0, 7), st.sets(st.integers(0, 63), max_size=6)), max_size=20),
    distance=st.integers(0, 4),
)
@settings(max_examples=150, deadline=None)
def test_phashes_are_compared_with_every_kept_one(phashes, flips, distance):
    """Equals brute force, although only hashes that share a band of bits are compared."""
    phashes = phashes + [phashes[i % len(phashes)] ^ sum(1 << bit for bit in bits) for i, bits in flips]
    deduplicator = Deduplicator(FilterConfig(duplicates="perceptual", max_distance=distance))
    kept: list[int] = []
    for number, phash in enumerate(phashes):
        is_new = all((phash ^ other).bit_count() > distance for other in kept)
        assert (deduplicator.duplicate_reason(RecordInfo(b"%d" % number, phash, 1, 1)) is None) == is_new
        if is_new:
            kept.append(phash)


def test_different_images_are_not_perceptual_duplicates(make, tmp_path):
    """40 noise images: pHash tells all of them apart at the largest distance."""
    random = np.random.default_rng(0)
    noise = [Image.fromarray(random.integers(0, 256, (32, 32), np.uint8)) for _ in range(40)]
    images = {f"k{i:02d}": {"png": encoded(image), "txt": b"x"} for i, image in enumerate(noise)}
    tar = write_tar(tmp_path / "in.tar", images)
    (made,) = make(images=(tar,), filters={"duplicates": "perceptual", "max_distance": 4})
    assert made.num_documents == 40
