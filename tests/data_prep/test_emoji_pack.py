"""The committed emoji pack matches its README, and its builder reproduces its format."""

import hashlib
import io
import json
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from webdataset import WebDataset

from data_prep.emoji import build
from data_prep.npm import NpmPackage, read_package
from megafusion.errors import UserError

ROOT = Path(__file__).parents[2]
PACK = ROOT / "data_prep/emoji/emoji-000000.tar"
STARTER = ROOT / "data_prep/emoji/starter.txt"


@pytest.fixture(scope="module")
def pairs() -> dict[str, tuple[np.ndarray, str]]:
    """(pixels [64, 64, 3], caption) by key, read as a user of webdataset reads them."""
    samples = WebDataset(str(PACK), shardshuffle=False)
    return {s["__key__"]: (np.asarray(Image.open(io.BytesIO(s["webp"]))), s["txt"].decode()) for s in samples}


@pytest.fixture(scope="module")
def starter() -> list[str]:
    return STARTER.read_text().splitlines()


def write_tarball(folder: Path, name: str, files: dict[str, bytes]) -> NpmPackage:
    """An npm tarball, and the package that describes it."""
    package = NpmPackage(name, "1.0.0", "")
    path = folder / package.filename
    with tarfile.open(path, "w:gz") as archive:
        for file, content in files.items():
            member = tarfile.TarInfo(f"package/{file}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return NpmPackage(name, "1.0.0", hashlib.sha256(path.read_bytes()).hexdigest())


def image(size: tuple[int, int], color: str, file_format: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGBA", size, color).save(buffer, file_format, lossless=True)
    return buffer.getvalue()


@pytest.fixture
def tiny(tmp_path, monkeypatch) -> Path:
    """A folder with small versions of the three tarballs, which the builder is patched to expect."""
    emojis = [
        {"label": "red apple", "hexcode": "1F34E", "group": 4},
        {"label": "red heart", "hexcode": "2764-FE0F", "group": 8},
        {"label": "copyright", "hexcode": "A9", "group": 8},
        {"label": "flag: Malta", "hexcode": "1F1F2-1F1F9", "group": 9},
        {"label": "regional indicator M", "hexcode": "1F1F2"},
        {"label": "waving hand: dark skin tone", "hexcode": "1F44B-1F3FF", "group": 1},
        {"label": "grinning cat", "hexcode": "1F63A", "group": 3},
    ]
    names = ("1f34e", "2764-fe0f", "00a9", "1f1f2-1f1f9", "1f1f2", "1f44b-1f3ff", "1f63a", "1f999")
    fluent = {f"assets/{name}.webp": image((16, 20), "#ff0000", "WEBP") for name in names}
    noto = {f"img/google/64/{name}.png": image((64, 64), "#ff000080", "PNG") for name in names}
    data = {"en/data.json": json.dumps(emojis).encode(), "LICENSE": b"MIT"}
    monkeypatch.setattr(build, "FLUENT", write_tarball(tmp_path, "@made-up/fluent", fluent))
    monkeypatch.setattr(build, "NOTO", write_tarball(tmp_path, "noto", noto))
    monkeypatch.setattr(build, "EMOJIBASE", write_tarball(tmp_path, "emojibase", data))
    monkeypatch.setattr(build, "STARTER_CONCEPTS", "red heart,\nred apple")
    return tmp_path


def test_pack_has_every_emoji_in_both_styles(pairs):
    styles = [key.rsplit("-", 1)[1] for key in pairs]
    assert (len(pairs), styles.count("3d"), styles.count("flat")) == (3234, 1598, 1636)
    assert list(pairs) == sorted(pairs)
    assert not any("." in key for key in pairs)


def test_every_image_is_64_pixels_rgb_and_not_blank(pairs):
    for key, (pixels, _) in pairs.items():
        assert pixels.shape == (64, 64, 3), key
        assert pixels.dtype == np.uint8, key
        assert np.ptp(pixels) > 30, key


def test_captions_name_a_label_and_the_style_of_their_key(pairs):
    for key, (_, caption) in pairs.items():
        match = re.fullmatch(r"\S.*, (3d|flat) style", caption)
        assert match, caption
        assert key.endswith(f"-{match[1]}")
    assert len({caption for _, caption in pairs.values()}) == len(pairs)


def test_flags_skin_tones_and_the_fluent_duplicate_are_excluded(pairs):
    assert "1F63A-3d" not in pairs
    assert "1F63A-flat" in pairs
    assert not any(caption.startswith("flag: ") or "skin tone" in caption for _, caption in pairs.values())


def test_starter_has_each_concept_in_both_styles(pairs, starter):
    assert 128 <= len(starter) <= 136
    assert len(set(starter)) == len(starter)
    concepts = [pairs[key][1].rsplit(", ", 1) for key in starter]
    assert [style for _, style in concepts] == ["3d style", "flat style"] * (len(starter) // 2)
    assert [c for c, _ in concepts[::2]] == [c for c, _ in concepts[1::2]]
    assert starter[:2] == ["1F34E-3d", "1F34E-flat"]


def test_starter_images_differ_from_one_another(pairs, starter):
    pixels = np.stack([pairs[key][0] for key in starter]).reshape(len(starter), -1) / 255
    for index in range(len(pixels) - 1):
        distances = np.sqrt(((pixels[index + 1 :] - pixels[index]) ** 2).mean(1))
        assert distances.min() > 0.1, starter[index]


def test_building_joins_renders_and_is_reproducible(tiny):
    build.build(packages=tiny, out=tiny / "a")
    build.build(packages=tiny, out=tiny / "b")
    content = (tiny / "a/emoji-000000.tar").read_bytes()
    assert content == (tiny / "b/emoji-000000.tar").read_bytes()
    assert (tiny / "a/starter.txt").read_text().split() == ["2764-3d", "2764-flat", "1F34E-3d", "1F34E-flat"]
    assert sorted(path.name for path in (tiny / "a").iterdir()) == ["emoji-000000.tar", "starter.txt"]

    samples = {s["__key__"]: s for s in WebDataset(str(tiny / "a/emoji-000000.tar"), shardshuffle=False)}
    both = [f"{key}-{style}" for key in ("00A9", "1F34E", "2764") for style in ("3d", "flat")]
    assert sorted(samples) == sorted([*both, "1F63A-flat"])
    assert samples["2764-flat"]["txt"] == b"red heart, flat style"
    flat = np.asarray(Image.open(io.BytesIO(samples["1F34E-flat"]["webp"])))
    assert np.abs(flat[32, 32].astype(int) - [255, 127, 127]).max() < 8  # half transparent, on white
    tall = np.asarray(Image.open(io.BytesIO(samples["1F34E-3d"]["webp"])))
    assert tall.shape == (64, 64, 3)
    assert tall[32, 1].min() > 240  # padded at the sides, not stretched
    assert tall[1, 32, 0] > 240 > tall[1, 32, 1]


def test_tar_does_not_depend_on_the_machine(tiny):
    build.build(packages=tiny, out=tiny)
    with tarfile.open(tiny / "emoji-000000.tar") as archive:
        assert {(m.mtime, m.uid, m.uname, m.mode) for m in archive} == {(0, 0, "", 0o644)}


def test_of_two_files_for_one_emoji_the_first_by_name_is_used():
    files = {"0023-20e3.png": b"second?", "0023-fe0f-20e3.png": b"same"}
    joined = build.join_pairs({"0023-20E3": "keycap: #"}, {"flat": files})
    assert joined == {"0023-20E3-flat": (b"second?", "keycap: #, flat style")}


def test_unknown_starter_concept_is_refused(tiny, monkeypatch):
    monkeypatch.setattr(build, "STARTER_CONCEPTS", "red apple, blue apple")
    with pytest.raises(UserError, match="blue apple, 3d style"):
        build.build(packages=tiny, out=tiny / "out")
    assert not (tiny / "out").exists()


def test_missing_tarball_is_refused_with_the_way_to_get_it(tmp_path):
    with pytest.raises(UserError, match=r"emojibase-data-17\.0\.0\.tgz.*npm pack emojibase-data@17\.0\.0"):
        build.build(packages=tmp_path, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_altered_tarball_is_refused(tiny):
    path = tiny / "made-up-fluent-1.0.0.tgz"
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(UserError, match=r"made-up-fluent-1\.0\.0\.tgz: sha256 is .*expected.*npm pack"):
        read_package(build.FLUENT, tiny, "assets/")
