"""The training of a VQModel: its loss, restarts of unused vectors, and its folder."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from data_prep.vae import train
from data_prep.vae.codebook import RESTART_EVERY, CodebookRestarts
from data_prep.vae.config import AutoencoderConfig, LossConfig
from data_prep.vae.losses import AutoencoderLoss
from data_prep.vae.train import train_autoencoder
from megafusion.config import parse_config
from megafusion.images.autoencoder import Quantized, encode
from megafusion.images.codec import ImageCodec, QuantizedCodec
from tests.support.tars import add_members


@pytest.fixture
def config(tmp_path):
    """A function from an output folder to a tiny training on images of one color each."""
    with tarfile.open(tmp_path / "colors-000000.tar", "w") as tar:
        for number, color in enumerate(np.random.default_rng(0).integers(0, 255, (40, 3))):
            Image.new("RGB", (16, 16), tuple(color.tolist())).save(file := io.BytesIO(), "PNG")
            add_members(tar, [(f"{number:03}.png", file.getvalue()), (f"{number:03}.txt", b"color")])

    def make(out: str, **optimization) -> AutoencoderConfig:
        network = {"unshuffle": 4, "channels": [8], "layers_per_block": 1, "norm_num_groups": 4}
        steps = {
            "num_steps": 40,
            "batch_size": 8,
            "learning_rate": 5e-3,
            "warmup_steps": 3,
            "evaluate_every": 20,
        }
        values = {
            "out": str(tmp_path / out),
            "data": {
                "images": [str(tmp_path / "colors-000000.tar")],
                "image_size": 16,
                "held_out_fraction": 0.2,
            },
            "network": network | {"codebook_size": 12, "latent_channels": 3, "mid_block_attention": False},
            "loss": {"reconstruction": "l2"},
            "optimization": steps | {"checkpoint_every": 10} | optimization,
            "num_threads": 1,
        }
        return parse_config(AutoencoderConfig, values, "test")

    return make


def test_a_short_training_learns_and_writes_a_codec(config):
    report = train_autoencoder(config("vq"))
    assert (report["num_codes"], report["codebook_size"]) == (16, 12)
    first, last = report["history"]
    assert last["psnr"] > first["psnr"]
    assert {"reconstruction", "codebook", "commitment"} < set(last)
    codec = ImageCodec.from_pretrained(config("vq").out)
    assert isinstance(codec, QuantizedCodec)
    assert codec.hash == report["codec_sha256"] == json.loads((config("vq").out / "report.json").read_text())[
        "codec_sha256"
    ]  # fmt: skip


def test_a_resumed_training_is_bitwise_identical(config, monkeypatch):
    """Also what restarts depend on, the counts of uses, is in the checkpoint."""
    monkeypatch.setattr(
        "data_prep.vae.codebook.RESTART_EVERY", 7
    )  # once more between the checkpoint and the end
    whole = train_autoencoder(config("whole", num_steps=16))
    save = train.save_checkpoint

    class Killed(Exception):
        pass

    def save_and_die(*arguments):
        save(*arguments)
        raise Killed

    monkeypatch.setattr(train, "save_checkpoint", save_and_die)
    with pytest.raises(Killed):
        train_autoencoder(config("parts", num_steps=16))
    monkeypatch.setattr(train, "save_checkpoint", save)
    assert train_autoencoder(config("parts", num_steps=16))["codec_sha256"] == whole["codec_sha256"]


def test_the_loss_moves_vectors_to_latents_and_latents_to_vectors(vq_folder):
    """Plain VQ-VAE: each distance moves one side alone, and beta weights the encoder's."""
    model = ImageCodec.from_pretrained(vq_folder).model.requires_grad_(True)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    loss = AutoencoderLoss(LossConfig(reconstruction="l2", commitment_weight=0.25))
    found = encode(model, images)
    assert isinstance(found, Quantized)
    found.latents.retain_grad()
    terms = loss(images, images, found, 1)
    (terms["codebook"] + terms["commitment"]).backward()
    torch.testing.assert_close(terms["commitment"], 0.25 * terms["codebook"])
    vectors = model.quantize.embedding.weight.detach()[found.codes].movedim(-1, 1)
    torch.testing.assert_close(
        found.latents.grad, 0.5 * (found.latents.detach() - vectors) / found.latents.numel()
    )
    one = int(found.codes.flatten()[0])
    mine = found.latents.detach().movedim(1, -1)[found.codes == one]
    expected = 2 * (model.quantize.embedding.weight.detach()[one] - mine).sum(0) / found.latents.numel()
    torch.testing.assert_close(model.quantize.embedding.weight.grad[one], expected)
    found = encode(model, images)
    assert isinstance(found, Quantized)
    found.latents.retain_grad()
    found.sample().sum().backward()  # straight through
    torch.testing.assert_close(found.latents.grad, torch.ones_like(found.latents))


def test_unused_vectors_alone_are_restarted_at_latents(vq_folder):
    model = ImageCodec.from_pretrained(vq_folder).model
    found = encode(model, torch.rand(4, 3, 32, 32) * 2 - 1)
    assert isinstance(found, Quantized)
    restarts, before = CodebookRestarts(40), model.quantize.embedding.weight.clone()
    for step in range(2, RESTART_EVERY):
        restarts.update(step, found, [model])
    assert torch.equal(model.quantize.embedding.weight, before)
    restarts.update(RESTART_EVERY, found, [model])
    after, used = model.quantize.embedding.weight, found.codes.unique()
    is_used = torch.zeros(40, dtype=torch.bool).index_fill(0, used, True)
    assert torch.equal(after[is_used], before[is_used])
    latents = found.latents.movedim(1, -1).flatten(0, 2)
    assert (after[~is_used][:, None] == latents).all(-1).any(-1).all()
    assert 0 < len(used) < 40
    assert restarts.uses.sum() == 0
