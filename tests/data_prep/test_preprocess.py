"""Images, captions and text to shards; bad input is named, and no partial output is left."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from megafusion.data.manifest import load_manifest
from megafusion.data.reader import ShardFolder
from megafusion.errors import UserError
from megafusion.images.codec import ImageCodec
from megafusion.images.processor import preprocess_images
from tests.support.raw import png, write_tar

GOOD = {
    "a": {"png": png("red"), "txt": b"red square"},
    "b": {"png": png("blue"), "txt": "café".encode()},
}


def test_pairs_hold_the_encoded_image_and_its_caption(make, tmp_path, vae_folder, tokenizer):
    make(images=(write_tar(tmp_path / "in.tar", GOOD),))
    folder = ShardFolder(tmp_path / "out/pairs")
    codec = ImageCodec.from_pretrained(vae_folder)
    assert folder.manifest.kind == "pair"
    assert folder.manifest.vae_sha256 == codec.hash
    assert folder.manifest.tokenizer_sha256 == tokenizer.hash
    assert folder.manifest.latent_shape == (4, 8, 8)
    assert (folder.manifest.latent_scale, folder.manifest.latent_shift) == (1.5, 0.1)
    document = folder.read(1)
    tokens, moments = (segment.data for segment in document.segments)
    assert document.metadata == {"key": "b", "caption": "café"}
    assert tokenizer.decode(tokens) == "café"
    mean, log_variance = codec.encode(preprocess_images([Image.new("RGB", (40, 40), "blue")], 32, 32))
    expected = torch.stack([mean[0], log_variance[0]]).numpy()
    np.testing.assert_allclose(moments, expected, rtol=2e-3, atol=2e-3)


def test_texts_are_a_document_per_line(make, tmp_path, tokenizer):
    path = tmp_path / "t.txt"
    path.write_text("one two\n\n  three \n")
    make(texts=(path,))
    folder = ShardFolder(tmp_path / "out/text")
    assert len(folder) == 2
    assert [tokenizer.decode(folder.read(i).segments[0].data) for i in range(2)] == ["one two", "three"]


def test_inputs_without_a_document_are_refused(make, tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("\n  \n")
    with pytest.raises(UserError, match=r"out/text: the inputs hold no valid document: .*; nothing is"):
        make(texts=(path,))
    assert not (tmp_path / "out/text").exists()


def test_a_folder_of_images_with_caption_files(make, tmp_path):
    images = tmp_path / "images/deep"
    images.mkdir(parents=True)
    (images / "x.JPG").write_bytes(png())
    (images / "x.txt").write_text("a square")
    make(images=(tmp_path / "images",))
    assert ShardFolder(tmp_path / "out/pairs").read(0).metadata == {"key": "deep/x", "caption": "a square"}


def test_shards_that_are_up_to_date_are_kept_and_others_rewritten(make, tmp_path):
    tar = write_tar(tmp_path / "in.tar", GOOD)
    shard = tmp_path / "out/pairs/shard-000000.tar"
    make(images=(tar,))
    first, content = shard.stat().st_ino, shard.read_bytes()
    make(images=(tar,))
    assert shard.stat().st_ino == first
    shard.write_bytes(content[:-512])
    make(images=(tar,))
    assert shard.read_bytes() == content
    write_tar(tar, {**GOOD, "c": {"png": png("green"), "txt": b"green"}})
    make(images=(tar,))
    assert load_manifest(tmp_path / "out/pairs").num_documents == 3


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"png": b"not an image", "txt": b"x"}, "key 'bad': image does not decode"),
        ({"png": png()[:60], "txt": b"x"}, "key 'bad': image does not decode"),
        ({"png": png(), "txt": b"  \n"}, "key 'bad': empty caption"),
        ({"png": png(), "txt": b"\xff\xfe"}, "key 'bad': caption is not UTF-8"),
        ({"png": png()}, "key 'bad': no caption"),
    ],
)
def test_a_bad_pair_fails_or_is_skipped_by_on_error(make, tmp_path, bad, message, capsys):
    tar = write_tar(tmp_path / "in.tar", {**GOOD, "bad": bad})
    with pytest.raises(UserError, match=rf"in\.tar, {message}.*on_error=skip"):
        make(images=(tar,))
    assert not (tmp_path / "out/pairs").exists()
    assert not list((tmp_path / "out").glob("*.partial"))
    make(images=(tar,), on_error="skip")
    assert load_manifest(tmp_path / "out/pairs").num_documents == 2
    assert f"1 x {message.split(': ')[1]}" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGBA", "P", "I;16"])
def test_any_image_mode_is_read(make, tmp_path, mode):
    buffer = io.BytesIO()
    Image.new(mode, (50, 30)).save(buffer, "JPEG" if mode == "CMYK" else "PNG")
    make(images=(write_tar(tmp_path / "in.tar", {"a": {"png": buffer.getvalue(), "txt": b"x"}}),))
    assert load_manifest(tmp_path / "out/pairs").num_images == 1


def test_missing_and_corrupt_inputs_are_named(make, tmp_path):
    with pytest.raises(UserError, match="nothing to preprocess"):
        make()
    with pytest.raises(UserError, match=r"none\.tar: no such file"):
        make(images=(tmp_path / "none.tar",))
    tar = write_tar(tmp_path / "in.tar", GOOD)
    keys = tmp_path / "keys.txt"
    keys.write_text("a\nzz\n")
    with pytest.raises(UserError, match=r"keys\.txt: 1 keys are not in any of `images`, the first 'zz'"):
        make(images=(tar,), keys=keys)
    cut = tmp_path / "cut.tar"
    cut.write_bytes(tar.read_bytes()[:700])
    with pytest.raises(UserError, match=r"cut\.tar: not readable as a tar"):
        make(images=(cut,))
    text = tmp_path / "t.txt"
    text.write_bytes(b"fine\n\xff\xfe\n")
    with pytest.raises(UserError, match=r"t\.txt, line 2: not UTF-8"):
        make(texts=(text,))
    assert not (tmp_path / "out/pairs").exists()
    assert not (tmp_path / "out/text").exists()


def test_images_can_be_stored_as_pixels(make, tmp_path):
    """Downscaled, uncropped WebP; the manifest has no autoencoder, and the sheet shows the images."""
    wide = {"w": {"png": png("red", (96, 48)), "txt": b"wide"}}
    make(images=(write_tar(tmp_path / "in.tar", {**GOOD, **wide}),), image_storage="pixels")
    folder = ShardFolder(tmp_path / "out/pairs")
    assert (folder.manifest.images, folder.manifest.vae_sha256) == ("pictures", None)
    kept = [Image.open(io.BytesIO(folder.read(i).segments[1].data)) for i in range(3)]
    assert [(image.format, image.size) for image in kept] == [
        ("WEBP", (32, 32)),
        ("WEBP", (32, 32)),
        ("WEBP", (64, 32)),
    ]
    assert np.abs(np.asarray(kept[2], int) - [255, 0, 0]).max() < 8
    assert Image.open(tmp_path / "out/pairs/sheet.png").size[0] > 64
