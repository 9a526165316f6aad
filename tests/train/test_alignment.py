"""Alignment of hidden states with a vision model's features."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    PretrainedConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTModel,
)

from megafusion.checkpoint.folder import complete_checkpoints
from megafusion.errors import UserError
from megafusion.generate.pipeline import TransfusionPipeline
from megafusion.model.transfusion import Transfusion
from megafusion.objective.alignment import Alignment
from megafusion.objective.config import AlignmentConfig
from megafusion.sequence.packing import PackedBatch
from megafusion.telemetry.metrics_file import read_metrics
from megafusion.train.image_encoder import ImageEncoder
from megafusion.train.vision_features import VisionFeatures
from tests.data.test_pixels import write_pixels
from tests.model.test_modality import first_batch
from tests.support.marks import full
from tests.support.rows import latents_as_features
from tests.support.runs import parsed, start, tensors
from tests.support.workers import run_workers
from tests.train.test_image_encoder import SIZES, batch

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]


@pytest.fixture(scope="module")
def vision(tmp_path_factory) -> Path:
    """A random DINOv2 of 24 features and patches of 7 pixels."""
    return save_model(tmp_path_factory.mktemp("vision") / "dino", Dinov2Config, Dinov2Model)


def save_model(folder: Path, config: type[PretrainedConfig], model: type) -> Path:
    """A random vision model of 24 features, trained with 4 x 4 patches of 7 pixels."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    model(config(**sizes, image_size=28, patch_size=7)).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD}))
    return folder


MODELS = [
    (CLIPVisionConfig, CLIPVisionModel),
    (SiglipVisionConfig, SiglipVisionModel),
    (ViTConfig, ViTModel),
    (Dinov2Config, Dinov2Model),
]


@pytest.mark.parametrize(("config", "model"), MODELS, ids=["clip", "siglip", "vit", "dinov2"])
def test_a_vision_model_takes_grids_that_it_was_not_trained_with(tmp_path, config, model):
    """And its last tokens are patches in raster order: the features of one change most with its pixels."""
    folder, grids = save_model(tmp_path, config, model), [(4, 4), (3, 6)]
    aligned = AlignmentConfig(model=folder, feature_size=24, layer=1)
    vision = VisionFeatures(aligned, grids, torch.device("cpu"), torch.float32)
    for grid in grids:
        pixels = torch.randint(0, 256, (2, 3, 7 * grid[0], 7 * grid[1]), dtype=torch.uint8)
        before = vision.at_patches(pixels, grid)
        assert before.shape == (2, grid[0] * grid[1], 24)
        pixels[:, :, 7:14, 14:21] = 255 - pixels[:, :, 7:14, 14:21]
        change = (vision.at_patches(pixels, grid) - before).norm(dim=-1)
        assert (change.argmax(1) == grid[1] + 2).all()


def save_swin(folder: Path) -> Path:
    sizes = {"embed_dim": 12, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2}
    return save_model(folder, lambda **_: SwinConfig(**sizes, image_size=32, patch_size=4), SwinModel)


def test_a_model_whose_tokens_are_no_patches_is_refused(tmp_path):
    """Swin merges them."""
    aligned = AlignmentConfig(model=save_swin(tmp_path), feature_size=24, layer=1)
    with pytest.raises(
        UserError, match=r"features of shape \[1, 4, 24\] .* 4 x 4 patches, not \[1, 16, 24\]"
    ):
        VisionFeatures(aligned, [(4, 4)], torch.device("cpu"), torch.float32)


@pytest.fixture
def aligned(run_values, vision, tokenizer, tmp_path) -> dict:
    """A run over pixels."""
    folder = write_pixels(tmp_path / "pixels", 40, tokenizer.hash)
    run_values["data"]["sources"]["pairs"]["path"] = str(folder)
    alignment = {"model": str(vision), "feature_size": 24, "layer": 1}
    return run_values | {"objective": {"alignment": alignment}}


def test_features_are_those_of_transformers_at_the_grid_of_patches(codec, vision):
    """Of images of two sizes, each alone and resized to 7 pixels a patch; none where there are no pixels."""
    config = AlignmentConfig(model=vision, feature_size=24, layer=1)
    features = VisionFeatures(config, [(4, 4), (2, 4)], torch.device("cpu"), torch.float32)
    before = batch()
    (after,) = ImageEncoder(codec, SIZES, "cpu", patch_size=2, vision=features).encode([before])
    (plain,) = ImageEncoder(codec, SIZES, "cpu").encode([before])
    assert torch.equal(after.latents, plain.latents)
    assert torch.equal(plain.features, before.features)
    (held_out,) = ImageEncoder(codec, SIZES, "cpu", patch_size=2, vision=features).encode([before], False)
    assert torch.equal(held_out.latents, plain.latents)
    assert torch.equal(held_out.features, before.features)
    assert after.features.shape == (3, 4, 16, 24)
    model = Dinov2Model.from_pretrained(vision).eval()
    for row, slot in torch.cartesian_prod(torch.arange(3), torch.arange(4)).tolist():
        found = after.features[row, slot]
        if not before.has_pixels[row, slot]:
            assert not found.any()
            continue
        rows, columns = (side // 2 for side in SIZES[before.image_size[row, slot]])
        pixels = before.pixels[row, slot, :, : 8 * rows, : 8 * columns][None].float()
        resized = F.interpolate(pixels, (7 * rows, 7 * columns), mode="bicubic", antialias=True)
        mean, std = (torch.tensor(each)[:, None, None] for each in (MEAN, STD))
        with torch.no_grad():
            hidden = model((resized.clamp(0, 255) / 255 - mean) / std).last_hidden_state[0, 1:]
        torch.testing.assert_close(found[: rows * columns], hidden, rtol=1e-4, atol=1e-4)
        assert not found[rows * columns :].any()


def test_the_error_is_the_cosine_over_the_patches_that_have_features():
    torch.manual_seed(0)
    layer = Alignment(8, AlignmentConfig(model=Path("m"), feature_size=6, layer=1))
    hidden, features = torch.randn(3, 5, 8), torch.randn(3, 5, 6)
    features[1, 3:], features[2] = 0, 0
    projected = layer.layers(hidden)
    cosine = (projected * features).sum(-1) / projected.norm(dim=-1) / features.norm(dim=-1).clamp(min=1e-9)
    expected = torch.stack([1 - cosine[0].mean(), 1 - cosine[1, :3].mean(), torch.zeros(())])
    torch.testing.assert_close(layer(hidden, features), expected)


def test_it_is_a_share_of_the_total_and_reaches_the_blocks_up_to_its_layer(run_values):
    """On a batch whose latents are the features; images that are given do not count."""
    alignment = {"model": "m", "feature_size": 16, "layer": 1, "weight": 2.0}
    config = parsed(run_values | {"objective": {"alignment": alignment}})
    packed: PackedBatch = first_batch(parsed(run_values))
    packed.features = latents_as_features(packed)
    torch.manual_seed(0)
    model = Transfusion(config.model, config.objective)
    found = model(packed)
    assert 0.5 < found.alignment < 1.5  # 1 - cosine of random projections
    torch.testing.assert_close(found.total, found.text + 5 * found.image + 2 * found.alignment)
    found.alignment.backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert any(name.startswith("blocks.0.") for name in reached)
    assert not any(name.startswith(("blocks.1.", "tail.")) for name in reached)
    assert {name for name in model.weights() if name.startswith("alignment.")} <= reached
    packed.has_loss = torch.zeros_like(packed.has_loss)
    none = model(packed)
    assert none.total == none.text


def test_a_run_aligns_and_publishes_no_projection(aligned, tmp_path):
    run = start(aligned)
    found = [line["alignment_loss"] for line in read_metrics(run)]
    assert all(0 < each < 2 for each in found)
    assert found[-1] < found[0]
    (*_, last) = complete_checkpoints(run / "checkpoints")
    assert any("alignment." in name for name in tensors(last))
    pipeline = TransfusionPipeline.from_pretrained(run)
    assert not any(name.startswith("alignment.") for name in pipeline.model.weights())
    assert pipeline.config.objective.alignment is None
    pipeline("apple", num_inference_steps=2)
    # A run without it may start from one with it; with it, its projection is new.
    aligned["train"] = aligned["train"] | {"init_from": str(run), "num_steps": 1}
    without = start(aligned | {"objective": {}}, out=str(tmp_path / "without"))
    again = start(aligned, out=str(tmp_path / "with"))
    flops = [read_metrics(each)[-1]["flops"] for each in (without, again)]
    assert flops[0] < flops[1], "the projection is counted"


def test_held_out_losses_take_no_features_and_no_projection(aligned, monkeypatch):
    """Counted are the rows whose features are computed, and the projections with and without gradients."""
    sources, calls = aligned["data"]["sources"], []
    at_patches, forward = VisionFeatures.at_patches, Alignment.forward
    monkeypatch.setattr(VisionFeatures, "at_patches", lambda *a: calls.append("features") or at_patches(*a))
    monkeypatch.setattr(
        Alignment, "forward", lambda *a: calls.append(f"gradients {torch.is_grad_enabled()}") or forward(*a)
    )
    start(aligned, stop_after=2)
    expected = calls.copy()
    calls.clear()
    aligned["data"]["validation"] = {"sources": sources, "every": 1, "num_batches": 2}
    aligned["telemetry"] = {"log_every": 1}
    run = start(aligned, stop_after=2, out=aligned["out"] + "-measured")
    assert [line["validation_image_loss"] > 0 for line in read_metrics(run)] == [True] * 2
    assert set(expected) == {"features", "gradients True"}
    assert calls == expected


def _run(values: dict) -> None:
    start(values)


@pytest.mark.parametrize("parallel", full({"tensor": 2, "sequence": True}, {"zero_stage": 3}))
def test_a_run_is_the_same_on_two_ranks(aligned, tmp_path, parallel):
    run_workers(_run, 1, aligned)
    other = aligned | {"out": str(tmp_path / "other"), "parallel": parallel}
    run_workers(_run, 2, other)
    figures = [
        [line[name] for line in read_metrics(Path(v["out"])) for name in ("image_loss", "alignment_loss")]
        for v in (aligned, other)
    ]
    assert figures[1] == pytest.approx(figures[0], rel=1e-4)


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("parallel", {"pipeline": 2}, "is not supported with parallel.pipeline 2; leave one of them out"),
        ("train", {"lora": {"rank": 2}}, "is not supported with train.lora"),
        ("model", {"num_layers": 1}, r"objective.alignment.layer 2 is above model.num_layers 1"),
    ],
)
def test_what_does_not_go_together_is_refused(aligned, section, changes, message):
    aligned["objective"]["alignment"]["layer"] = 2
    aligned[section] = aligned.get(section, {}) | changes
    with pytest.raises(UserError, match=message):
        parsed(aligned)


def test_inputs_that_do_not_fit_are_refused_before_anything_is_written(aligned, shards, tmp_path):
    alignment = aligned["objective"]["alignment"]
    cases = [
        ({"feature_size": 768}, r"feature_size 768: the features of .*dino have 24 numbers .*; set it to 24"),
        ({"model": str(tmp_path)}, r"no config.json; name a folder of a vision model"),
        ({"model": aligned["data"]["vae"]}, r"config.json: no hidden_size; give a vision model"),
        ({"model": str(save_swin(tmp_path / "swin"))}, r"swin: gives features of shape"),
    ]
    for changes, message in cases:
        with pytest.raises(UserError, match=message):
            start(aligned | {"objective": {"alignment": alignment | changes}})
    aligned["data"]["sources"]["pairs"]["path"] = str(shards / "pairs")
    with pytest.raises(
        UserError, match=r"data.sources.pairs keeps latents; preprocess it with image_storage"
    ):
        start(aligned)
    assert not Path(aligned["out"]).exists()
