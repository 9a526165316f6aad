"""Four styles of the same concepts: committed images, folds that hold combinations out, and the builder."""

import hashlib
import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from webdataset import WebDataset

from data_prep.emoji import build as emoji
from data_prep.emoji import styles
from data_prep.emoji.styles import concept_of, held_out_keys, keys_of_concepts, style_of
from megafusion.errors import UserError
from tests.data_prep.test_emoji_pack import image, write_tarball
from tests.support.small import ROOT

STYLES = ("3d", "flat", "openmoji", "twemoji")
COMMITTED = ROOT / styles.COMMITTED
KEYS = (COMMITTED / "keys.txt").read_text().split()
SVG = (
    b'<svg viewBox="0 0 72 72" xmlns="http://www.w3.org/2000/svg"><path fill="#00f" d="M0 0h36v72H0z"/></svg>'
)


@st.composite
def grids(draw) -> tuple[list[str], int]:
    """Keys of some concepts, each in two styles or more, in any order; and a number of folds."""
    num_styles = draw(st.integers(2, 6))
    names = [f"style{number}" for number in range(num_styles)]
    chosen = st.lists(st.sampled_from(names), min_size=2, unique=True)
    concepts = draw(st.lists(chosen, min_size=1, max_size=30))
    keys = [f"{number:X}-200D-{style}" for number, own in enumerate(concepts) for style in own]
    if len({style_of(key) for key in keys}) < 2:
        keys += ["FFFF-style0", "FFFF-style1"]
    return draw(st.permutations(keys)), draw(st.integers(num_styles, 9))


@given(grids())
def test_folds_hold_each_key_out_once_and_leave_each_concept_in_training(grid):
    keys, num_folds = grid
    folds = [held_out_keys(keys, fold, num_folds) for fold in range(num_folds)]
    assert Counter(key for fold in folds for key in fold) == Counter(keys)
    for fold in folds:
        assert max(Counter(map(concept_of, fold)).values(), default=0) <= 1
        assert {concept_of(key) for key in set(keys) - set(fold)} == set(map(concept_of, keys))
    assert set(held_out_keys(sorted(keys), 0, num_folds)) == set(folds[0])


@given(st.integers(8, 60), st.integers(2, 5), st.integers(0, 4))
def test_every_style_is_held_out_equally_often(num_concepts, num_styles, fold):
    keys = [f"{number:X}-s{style}" for number in range(num_concepts) for style in range(num_styles)]
    counts = Counter(map(style_of, held_out_keys(keys, fold)))
    assert all(
        counts[f"s{style}"] in (num_concepts // 5, -(-num_concepts // 5)) for style in range(num_styles)
    )
    assert set(map(style_of, set(keys) - set(held_out_keys(keys, fold)))) == set(map(style_of, keys))


@pytest.mark.parametrize(
    ("keys", "fold", "fault"),
    [
        (["A-3d", "A-flat"], 5, "there are 5; give one from 0 to 4"),
        (["A-3d", "B-3d"], 0, "1 styles in 5 folds"),
        ([f"A-{style}" for style in range(6)], 0, "6 styles in 5 folds"),
        (["A-3d", "A-flat", "A-3d"], 0, "not unique"),
        (["A-3d", "A-flat", "B-3d"], 0, "concept B has one style"),
    ],
)
def test_keys_that_cannot_be_held_out_are_refused(keys, fold, fault):
    with pytest.raises(UserError, match=fault):
        held_out_keys(keys, fold)


@pytest.mark.parametrize("fold", range(5))
def test_a_fold_of_fewer_concepts_is_a_part_of_that_of_all(fold):
    fewer = keys_of_concepts(KEYS, 64)
    assert len({concept_of(key) for key in fewer}) == 64
    assert len(fewer) == 256
    whole = set(held_out_keys(KEYS, fold))
    assert held_out_keys(fewer, fold) == [key for key in fewer if key in whole]
    with pytest.raises(UserError, match="--num-concepts 129: there are 128"):
        keys_of_concepts(KEYS, 129)


def test_the_committed_keys_are_128_concepts_in_four_styles():
    assert len(KEYS) == len(set(KEYS)) == 512
    assert Counter(map(style_of, KEYS)) == dict.fromkeys(STYLES, 128)
    assert sum(path.stat().st_size for path in COMMITTED.iterdir()) < 2_000_000
    starter = set((ROOT / "data_prep/emoji/starter.txt").read_text().split())
    assert starter < set(KEYS), "the quickstart's concepts are among them"


@pytest.mark.parametrize("style", ["twemoji", "openmoji"])
def test_committed_images_are_64_pixels_rgb_and_captioned_as_the_pack(style):
    samples = list(WebDataset(str(COMMITTED / f"{style}.tar"), shardshuffle=False))
    assert [s["__key__"] for s in samples] == [key for key in KEYS if style_of(key) == style]
    pack = WebDataset(str(ROOT / styles.PACK), shardshuffle=False)
    labels = {s["__key__"]: s["txt"].decode().removesuffix(", flat style") for s in pack}
    for sample in samples:
        pixels = np.asarray(Image.open(io.BytesIO(sample["webp"])))
        assert (pixels.shape, pixels.dtype) == ((64, 64, 3), np.uint8)
        assert np.ptp(pixels) > 30
        assert sample["txt"].decode() == f"{labels[concept_of(sample['__key__']) + '-flat']}, {style} style"


@pytest.fixture
def small(tmp_path, monkeypatch) -> Path:
    """A folder with small versions of the three tarballs, and of the emoji pack."""
    names = ("1f34e", "1f34f", "2764-fe0f")
    labels = dict(zip(names, ("red apple", "green apple", "red heart"), strict=True))
    data = [{"label": label, "hexcode": name.upper(), "group": 4} for name, label in labels.items()]
    twemoji = {f"img/twitter/64/{name}.png": image((64, 64), "#ff0000", "PNG") for name in names}
    openmoji = {f"color/svg/{name.upper()}.svg": SVG for name in names}
    packages = {
        "EMOJIBASE": ("emojibase", {"en/data.json": json.dumps(data).encode()}),
        "TWEMOJI": ("twemoji", twemoji),
        "OPENMOJI": ("openmoji", openmoji),
    }
    for name, (package, files) in packages.items():
        monkeypatch.setattr(styles, name, write_tarball(tmp_path, package, files))
    pairs = {
        f"{code}-{style}": (emoji.render(image((64, 64), "#ff0000", "PNG")), f"{label}, {style} style")
        for code, label in (("1F34E", "red apple"), ("2764", "red heart"), ("1F9FF", "amulet"))
        for style in ("3d", "flat")
    }
    (tmp_path / "pack.tar").write_bytes(emoji.pack(pairs))
    return tmp_path


def test_the_builder_draws_what_every_style_has_and_is_reproducible(small):
    for name in ("a", "b"):
        styles.build(small, small / name, small / "pack.tar")
    keys = (small / "a/keys.txt").read_text().split()
    assert keys == [f"{code}-{style}" for code in ("1F34E", "2764") for style in STYLES]
    for style in ("twemoji", "openmoji"):
        digests = {hashlib.sha256((small / n / f"{style}.tar").read_bytes()).digest() for n in ("a", "b")}
        assert len(digests) == 1
    with tarfile.open(small / "a/openmoji.tar") as archive:
        assert archive.getnames()[:2] == ["1F34E-openmoji.webp", "1F34E-openmoji.txt"]
        drawn = np.asarray(Image.open(archive.extractfile(archive.getnames()[0])))
    assert np.abs(drawn[32, 16].astype(int) - [0, 0, 255]).max() < 8
    assert drawn[32, 48].min() > 247


def test_a_starter_concept_that_a_style_lacks_is_refused_and_nothing_is_written(small):
    with pytest.raises(UserError, match=r"not in every style: .*airplane"):
        styles.build(small, small / "out", small / "pack.tar", starter=True)
    assert not (small / "out").exists()


def test_a_fold_is_written_whole_with_its_texts_and_captions(small):
    styles.build(small, small / "built", small / "pack.tar")
    texts = small / "texts.txt"
    texts.write_text("".join(f"word: {number}\n" for number in range(503)))
    arguments = {"styles": small / "built", "pack_tar": small / "pack.tar", "texts": texts}
    folds = [small / f"fold-{fold}" for fold in range(5)]
    for fold, folder in enumerate(folds):
        styles.split(folder, fold, 5, **arguments)
    held_out = [line for folder in folds for line in (folder / "held-out.txt").read_text().split()]
    assert sorted(held_out) == sorted((small / "built/keys.txt").read_text().split())
    assert (folds[0] / "text.txt").read_text().splitlines() == ["word: 0", "word: 1", "word: 2"]
    assert len((folds[0] / "held-out-text.txt").read_text().splitlines()) == 500
    coco = json.loads((folds[1] / "captions.json").read_text())
    groups = {each["key"]: each["group"] for each in coco["images"]}
    kept = (folds[1] / "held-out.txt").read_text().split()
    assert {key for key, group in groups.items() if group == "held-out"} == set(kept)
    assert all((folds[1] / each["file_name"]).is_file() for each in coco["images"])
    assert coco["annotations"][0] == {"id": 1, "image_id": 1, "caption": "red apple, 3d style"}

    texts.write_text("word: 1\n")
    with pytest.raises(UserError, match=r"texts\.txt: has 1 lines"):
        styles.split(folds[0], 0, 5, **arguments)
    (small / "built/keys.txt").write_text("1F34E-3d\nFFFF-3d\n")
    with pytest.raises(UserError, match=r"FFFF-3d of keys\.txt is in none of"):
        styles.split(folds[0], 0, 5, **arguments)
