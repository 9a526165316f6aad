"""Images as codes: in shards, in sequences, and refused where they do not belong."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from megafusion.data.document_format import BadDocument, StoredDocument
from megafusion.data.images import decode, first_images
from megafusion.data.loader import DataLoader
from megafusion.data.manifest import write_manifest
from megafusion.data.reader import ShardFolder
from megafusion.data.shards import write_shard
from megafusion.errors import UserError
from megafusion.images.codec import ImageCodec
from megafusion.parallel.mesh import make_mesh
from megafusion.sequence.document import FlatDocument, ImageSegment, Segment, find_cut, flatten
from megafusion.train.build import build_components
from tests.support.quantized import CODEBOOK_SIZE
from tests.support.runs import parsed
from tests.support.small import small_run

CODES = np.arange(6, dtype=np.int32).reshape(2, 3)


def loader_of(values: dict) -> DataLoader:
    from megafusion.engine.process_group import start_process_group

    start_process_group()
    config = parsed(values)
    return build_components(config, make_mesh(config.parallel)).loader


def flat(tokenizer, *segments: Segment) -> FlatDocument:
    return flatten(segments, tokenizer, (6,))


def test_shards_hold_the_codes_of_their_images(shards, quantized_shards, codec, vq_folder):
    latents, codes = (ShardFolder(folder / "pairs") for folder in (shards, quantized_shards))
    vq = ImageCodec.from_pretrained(vq_folder)
    assert (codes.manifest.images, codes.manifest.codebook_size) == ("codes", CODEBOOK_SIZE)
    assert codes.manifest.latent_shape == (0, 4, 4)
    assert codes.manifest.vae_sha256 == vq.hash
    for index in (0, 9, 21):
        old, new = latents.read(index), codes.read(index)
        assert old.metadata == new.metadata
        assert (old.segments[0].data == new.segments[0].data).all()
        (image,) = first_images([new])
        (shown,) = decode([image], vq)
        assert shown.size == (32, 32)
        torch.testing.assert_close(
            torch.tensor(np.asarray(shown)),
            torch.tensor(np.asarray(vq.decode_images(torch.tensor(image.data)[None])[0])),
        )


def test_codes_are_tokens_behind_those_of_the_text(tokenizer):
    """bos, 7, boi, six codes, eoi, 8, eos: causal, and everything but bos is predicted."""
    first = tokenizer.num_ids(1)
    image = ImageSegment("codes", CODES)
    document = flat(tokenizer, Segment("tokens", [7]), image, Segment("tokens", [8]))
    expected = [tokenizer.bos, 7, tokenizer.boi, *range(first, first + 6), tokenizer.eoi, 8, tokenizer.eos]
    assert document.tokens.tolist() == expected
    assert document.labels.tolist() == [*expected[1:], -100]
    assert document.row_end.tolist() == list(range(1, 13))
    assert (document.patch == -1).all()
    assert (document.image_start.tolist(), document.image_end.tolist()) == ([3], [9])


def test_given_codes_and_their_eoi_are_not_predicted(tokenizer):
    image = ImageSegment("codes", CODES, is_given=True)
    document = flat(tokenizer, image, Segment("tokens", [8]))
    assert document.labels.tolist() == [tokenizer.boi, *[-100] * 7, 8, tokenizer.eos, -100]


@pytest.mark.parametrize("kind", ["codes", "latents"])
def test_no_cut_splits_an_image(tokenizer, kind):
    image = ImageSegment(kind, CODES)  # positions 5 to 12: boi, six codes or patches, eoi
    document = flat(tokenizer, Segment("tokens", [5] * 4), image, Segment("tokens", [6] * 9))
    cuts = {room: find_cut(document, 0, len(document), room, 1, 2) for room in range(3, 20)}
    assert cuts == {room: room if room <= 5 or room > 12 else 5 for room in range(3, 20)}


def test_rows_of_codes_have_no_latents(quantized_values):
    quantized_values["data"]["caption_dropout"] = 0
    (batch, *_) = loader_of(quantized_values).next()
    assert batch.latents.numel() == 0
    assert not batch.has_loss.any()
    assert (batch.patch_index == -1).all()
    is_code = batch.tokens >= 2048
    assert is_code.sum() % 16 == 0
    assert is_code.any()
    targets = batch.labels[is_code]
    assert ((targets >= 2048) | (targets == 2047) | (targets == 2046)).all()
    assert (batch.row_end == torch.arange(1, batch.tokens.shape[1] + 1)).all()  # causal


def write_codes(folder, manifest, codes: np.ndarray) -> ShardFolder:
    """A folder of one pair, whose manifest is another's."""
    folder.mkdir()
    pair = StoredDocument({"key": "a"}, (Segment("tokens", np.array([5], np.int32)), Segment("codes", codes)))
    summary = write_shard(folder, 0, [pair])
    kept = ("kind", "images", "tokenizer_sha256", "vae_sha256", "latent_shape", "codebook_size", "provenance")
    write_manifest(folder, [summary], {name: getattr(manifest, name) for name in kept})
    return ShardFolder(folder)


@pytest.mark.parametrize(
    ("codes", "reason"),
    [
        (np.full((4, 4), CODEBOOK_SIZE, np.int32), f"code {CODEBOOK_SIZE} beyond the manifest's codebook of"),
        (np.full((4, 4), -1, np.int32), "a negative code"),
        (np.zeros((4, 5), np.int32), r"codes of shape \(4, 5\) where the manifest says \(4, 4\)"),
        (np.zeros((4, 4), np.int64), "an array of type int64"),
    ],
)
def test_codes_that_the_manifest_does_not_allow_are_bad_documents(quantized_shards, tmp_path, codes, reason):
    manifest = ShardFolder(quantized_shards / "pairs").manifest
    good = write_codes(tmp_path / "good", manifest, np.zeros((4, 4), np.int32))
    assert good.read(0).segments[1].data.shape == (4, 4)
    with pytest.raises(BadDocument, match=rf"document 0: not readable \({reason}.*data.on_error=skip"):
        write_codes(tmp_path / "bad", manifest, codes).read(0)


def test_shards_of_another_kind_of_model_are_refused(
    shards, quantized_shards, vae_folder, quantized_values, tmp_path
):
    latent_values = small_run(quantized_shards, vae_folder, tmp_path / "run")
    with pytest.raises(
        UserError, match=r"data.sources.pairs: .* holds images as codes, but data.vae is an Auto"
    ):
        loader_of(latent_values)
    quantized_values["data"]["sources"]["pairs"]["path"] = str(shards / "pairs")
    with pytest.raises(
        UserError, match=r"pairs holds images as latents, but data.vae is a VQModel, .* preprocess"
    ):
        loader_of(quantized_values)
    shutil.copytree(shards / "pairs", tmp_path / "pixels")
    manifest = json.loads((tmp_path / "pixels/manifest.json").read_text())
    (tmp_path / "pixels/manifest.json").write_text(json.dumps(manifest | {"images": "pictures"}))
    quantized_values["data"]["sources"]["pairs"]["path"] = str(tmp_path / "pixels")
    with pytest.raises(UserError, match=r"holds images as pixels, .* with image_storage: latents"):
        loader_of(quantized_values)


def test_models_of_another_autoencoder_are_refused(quantized_values, vae_folder, shards, vq_folder, tmp_path):
    latent = small_run(shards, vae_folder, tmp_path / "run")
    latent["data"]["vae"] = str(vq_folder)
    with pytest.raises(
        UserError, match=r"codebook_size is 0, .* a VQModel with 40 codes; set .*: 40, .*size: 1"
    ):
        loader_of(latent)
    quantized_values["data"]["vae"] = str(vae_folder)
    with pytest.raises(
        UserError, match=r"model.codebook_size is 40, but the autoencoder is an AutoencoderKL"
    ):
        loader_of(quantized_values)
    quantized_values["data"]["vae"] = str(vq_folder)
    quantized_values["model"]["vocab_size"] = 2060
    with pytest.raises(UserError, match=r"model.vocab_size 2060, .* has 2088 ids .* and 40 codes\)"):
        loader_of(quantized_values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent_channels": 4}, "codebook_size 40 with latent_channels 4: images are codes or latents"),
        ({"codebook_size": 0}, "codebook_size 0 with latent_channels 0: images are codes or latents"),
        ({"patch_size": 2}, "patch_size 2: is for images that are latents; with codebook_size set it to 1"),
        ({"adapter": "unet"}, "adapter unet: is for images that are latents"),
        ({"modality_weights": "all"}, "modality_weights all: is for images that are latents"),
    ],
)
def test_keys_that_exclude_a_codebook_are_refused(quantized_values, changes, message):
    quantized_values["model"] |= changes
    with pytest.raises(UserError, match=message):
        parsed(quantized_values)


def test_a_run_takes_the_codebook_from_its_data(quantized_values, tmp_path):
    from megafusion.train.from_data import load_training_config
    from megafusion.yaml_values import dump_yaml

    whole = parsed(quantized_values)
    given = ("codebook_size", "latent_channels", "latent_downsampling", "vocab_size", "image_sizes")
    model = {key: value for key, value in quantized_values["model"].items() if key not in given}
    path = tmp_path / "run.yaml"
    path.write_text(dump_yaml(quantized_values | {"model": model}))
    assert load_training_config(path) == whole
    assert replace(whole.sequence_shape, num_images=1).latent_channels == 0
