"""The committed classifier is accurate on corrupted images and rejects images without a concept."""

import runpy
import sys
from pathlib import Path

import pytest
import torch

from data_prep.emoji import train_classifier as module
from megafusion.errors import UserError
from megafusion.evaluate.classifier import OTHER, ImageClassifier
from megafusion.evaluate.distortions import CORRUPTIONS, NOISE_STD, corrupt

ROOT = Path(__file__).parents[2]
PACK = ROOT / "data_prep/emoji/emoji-000000.tar"
STARTER = ROOT / "data_prep/emoji/starter.txt"
WEIGHTS = ROOT / "data_prep/emoji/classifier.safetensors"


@pytest.fixture(scope="module")
def images_by_key() -> dict[str, torch.Tensor]:
    return module.read_pack(PACK)


@pytest.fixture(scope="module")
def classifier() -> ImageClassifier:
    return ImageClassifier.load(WEIGHTS)


@pytest.fixture(scope="module")
def starter(images_by_key, classifier) -> torch.Tensor:
    return torch.stack([images_by_key[key] for key in classifier.keys])


def test_weights_are_small_and_name_the_starter_split(classifier):
    assert WEIGHTS.stat().st_size <= 1_000_000
    assert classifier.keys == STARTER.read_text().split()


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_corrupted_images_are_classified_correctly(classifier, starter, corruption):
    # A seed that the stored metrics did not use.
    assert classifier.accuracy(starter, classifier.keys, corruption, seed=7) >= 0.97


def test_another_key_is_wrong(classifier, starter):
    assert classifier.accuracy(starter, classifier.keys[2:] + classifier.keys[:2]) == 0
    other_style = [
        key for pair in zip(classifier.keys[1::2], classifier.keys[::2], strict=True) for key in pair
    ]
    assert classifier.accuracy(starter, other_style) == 0


def test_images_without_a_concept_are_other(classifier, starter):
    random = torch.Generator().manual_seed(0)
    white = torch.ones(1, 3, 64, 64)
    noisy_white = (white + 0.1 * torch.randn(1, 3, 64, 64, generator=random)).clamp(0, 1)
    noise = torch.rand(8, 3, 64, 64, generator=random)
    empty = torch.cat([white, noisy_white, torch.zeros_like(white), noise, starter.mean(0, keepdim=True)])
    assert set(classifier.classify(empty)) == {OTHER}


def test_stored_metrics_are_reproduced(classifier, images_by_key):
    metrics = module.measure(classifier, images_by_key)
    assert metrics == pytest.approx(classifier.metrics, abs=0.01)
    assert metrics["half-blends to one of the two"] >= 0.9
    assert metrics["other pictures taken for a concept, clean"] <= 0.05


def test_corruptions_have_their_strength(starter):
    edge = torch.zeros(1, 3, 64, 64)
    edge[..., 32:] = 1
    ramp = corrupt(edge, "blur")[0, 0, 32]
    assert 0.55 < ramp[32] < 0.62  # the Gaussian's integral half a pixel past the edge
    assert ramp.diff().min() >= 0
    noise = corrupt(torch.full((4, 3, 64, 64), 0.5), "noise") - 0.5
    assert noise.std() == pytest.approx(NOISE_STD, rel=0.05)
    shifted = corrupt(starter[:1], "shift")
    origins = [starter[:1].roll((y, x), (2, 3)) for y in (-2, 2) for x in (-2, 2)]
    assert any(torch.equal(shifted[..., 4:-4, 4:-4], o[..., 4:-4, 4:-4]) for o in origins)
    with pytest.raises(ValueError, match="use one of clean, blur"):
        corrupt(starter, "smear")


def test_training_learns_and_is_bitwise_reproducible(images_by_key, tmp_path):
    keys = STARTER.read_text().split()[:8]
    few = {key: images_by_key[key] for key in [*list(images_by_key)[:200], *keys]}
    first, second = (module.train_classifier(few, keys, num_steps=40) for _ in range(2))
    images = torch.stack([images_by_key[key] for key in keys])
    assert first.accuracy(images, keys) == 1
    first.save(tmp_path / "first.safetensors")
    second.save(tmp_path / "second.safetensors")
    assert (tmp_path / "first.safetensors").read_bytes() == (tmp_path / "second.safetensors").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first.safetensors", "second.safetensors"]
    assert ImageClassifier.load(tmp_path / "first.safetensors").classify(images) == keys


def test_invalid_input_is_refused_by_name(classifier, images_by_key, tmp_path):
    with pytest.raises(UserError, match=r"\(1, 3, 32, 32\).*resize"):
        classifier.classify(torch.ones(1, 3, 32, 32))
    for content in (None, b"not weights"):
        path = tmp_path / "bad.safetensors"
        if content:
            path.write_bytes(content)
        with pytest.raises(UserError, match=r"bad\.safetensors: not classifier weights"):
            ImageClassifier.load(path)
    with pytest.raises(UserError, match=r"no\.tar: no such file"):
        module.read_pack(tmp_path / "no.tar")
    (tmp_path / "keys.txt").write_text("1F34E-3d\nFFFF-3d\n")
    with pytest.raises(UserError, match=r"keys\.txt: not in the pack: \['FFFF-3d'\]"):
        module.read_keys(tmp_path / "keys.txt", images_by_key)


def test_command_reports_errors_without_a_traceback(tmp_path, monkeypatch, capsys):
    arguments = ["measure", "--pack", str(PACK), "--weights", str(tmp_path / "none")]
    monkeypatch.setattr(sys, "argv", ["train_classifier", *arguments])
    monkeypatch.delitem(sys.modules, module.__name__)
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module(module.__name__, run_name="__main__")
    assert stopped.value.code == 2
    assert "none: not classifier weights" in capsys.readouterr().err
