"""Weights of their own for image patches."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megafusion.engine.process_group import start_process_group
from megafusion.errors import UserError
from megafusion.generate.pipeline import TransfusionPipeline
from megafusion.model.modality import ModalityLinear, ModalityRMSNorm, modality_of
from megafusion.model.transfusion import Transfusion
from megafusion.parallel.mesh import make_mesh
from megafusion.train.build import build_components
from megafusion.train.config import RunConfig
from tests.support.marks import full
from tests.support.runs import parsed, start
from tests.support.small import small_run
from tests.support.texts import text_logits
from tests.support.weights import initialize

TEXT_KEYS = {"qk_norm": True, "attention_bias": True}


rows = st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=3)


@given(rows, st.sampled_from(["plain", "bias", "sorted input", "sorted output"]), st.booleans())
def test_each_position_has_the_weight_of_its_modality(is_patch, kind, is_grouped):
    """Also as a GPU computes it, without knowing on the host how many are texts."""
    is_patch_BS = torch.tensor(is_patch)
    modality = modality_of(is_patch_BS, is_patch_BS)
    if is_grouped:
        modality = modality._replace(num_texts=None)
    torch.manual_seed(0)
    gives_sorted = kind == "sorted output"
    layer = ModalityLinear(8, 16, bias=kind == "bias", for_patches=True, gives_sorted=gives_sorted)
    for parameter in layer.parameters():
        parameter.data.normal_()
    x = torch.randn(*is_patch_BS.shape, 8, requires_grad=True)
    images = torch.nn.functional.linear(x, layer.image_weight, layer.image_bias)
    texts = torch.nn.functional.linear(x, layer.weight, layer.bias)
    expected = torch.where(is_patch_BS[..., None], images, texts)
    wanted = (x, *layer.parameters())
    found = layer(modality.sort(x) if kind == "sorted input" else x, modality)
    if gives_sorted:
        assert torch.equal(modality.sort(is_patch_BS[..., None])[:, 0], is_patch_BS.flatten().sort()[0])
        found = modality.unsort(found)
    torch.testing.assert_close(found, expected)
    gradients = (torch.autograd.grad(y.square().sum(), wanted) for y in (found, expected))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def first_batch(config: RunConfig):
    start_process_group()
    return build_components(config, make_mesh(config.parallel)).loader.next()[0]


@pytest.mark.parametrize("weights", ["feed_forward", "all"])
def test_with_equal_weights_it_is_the_plain_model(run_values, weights):
    run_values["model"] |= TEXT_KEYS
    batch = first_batch(parsed(run_values))
    losses, shapes = [], []
    for each in ("none", weights):
        run_values["model"]["modality_weights"] = each
        config = parsed(run_values)
        model = Transfusion(config.model, config.objective)
        initialize(model, config.model.num_layers, 0)
        values = model.weights()
        for name in values:
            values[name].copy_(values[name.replace(".image_", ".")])
        with torch.no_grad():
            losses.append(torch.stack(model(batch)))
            images = [name for name in values if ".image_" in name]
            for name in images:
                values[name].add_(0.1)
            if images:
                assert (torch.stack(model(batch))[:2] != losses[-1][:2]).all()
        shapes.append(images)
    torch.testing.assert_close(*losses, rtol=1e-6, atol=1e-6)
    inner = {name.partition(".")[2].partition(".")[2] for name in shapes[1]}
    products = {f"feed_forward{name}.image_weight" for name in ("_norm", ".gate_up", ".down")}
    if weights == "all":
        products |= {f"attention.{name}.image_weight" for name in ("qkv", "out", "q_norm", "k_norm")}
        products |= {"attention.qkv.image_bias", "attention_norm.image_weight"}
    assert inner == products


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_has_the_bits_of_plain_norms(dtype):
    torch.manual_seed(0)
    norm = ModalityRMSNorm(64, eps=1e-5)
    for parameter in norm.parameters():
        parameter.data.normal_()
    norm = norm.to(dtype)
    x, is_patch = torch.randn(2, 9, 64).to(dtype), torch.rand(2, 9, 1) < 0.5
    texts, images = (
        torch.nn.functional.rms_norm(x, (64,), weight, 1e-5) for weight in (norm.weight, norm.image_weight)
    )
    assert torch.equal(norm(x, is_patch), torch.where(is_patch, images, texts))


@pytest.fixture(scope="module")
def plain_run(shards, vae_folder, tmp_path_factory) -> Path:
    values = small_run(shards, vae_folder, tmp_path_factory.mktemp("plain") / "run")
    values["model"] |= TEXT_KEYS
    return start(values)


FROZEN = ["stem.embedding.*", "blocks.*.weight", "blocks.*.bias", "tail.norm.*", "tail.head.*"]
"""The text path (LMFusion, arXiv 2412.15188): all but the adapters and the weights of image patches."""


@pytest.mark.parametrize("num_steps", [5, *full(100)])
def test_with_the_text_path_frozen_its_logits_stay_bit_for_bit(run_values, plain_run, num_steps):
    run_values["model"] |= TEXT_KEYS | {"modality_weights": "all"}
    run_values["train"] |= {"init_from": str(plain_run), "freeze": FROZEN, "num_steps": num_steps}
    began, now = (TransfusionPipeline.from_pretrained(path) for path in (plain_run, start(run_values)))
    assert torch.equal(text_logits(now.model), text_logits(began.model))
    weights = now.model.weights()
    before = began.model.weights()
    images = [name for name in weights if ".image_" in name]
    assert images
    assert not any(torch.equal(weights[name], before[name.replace(".image_", ".")]) for name in images)


def test_they_start_as_the_texts(run_values, plain_run):
    """A rate of almost nothing leaves what the weights started as."""
    run_values["model"] |= TEXT_KEYS | {"modality_weights": "feed_forward"}
    run_values["train"] |= {"init_from": str(plain_run), "num_steps": 1}
    run_values["optimizer"] = {"learning_rate": 1e-12, "num_warmup_steps": 1}
    now = TransfusionPipeline.from_pretrained(start(run_values)).model.weights()
    began = TransfusionPipeline.from_pretrained(plain_run).model.weights()
    for name, weight in now.items():
        torch.testing.assert_close(weight, began[name.replace(".image_", ".")], rtol=0, atol=1e-9)


def test_a_run_with_them_is_no_start_of_one_without(run_values, plain_run, tmp_path):
    run_values["model"] |= TEXT_KEYS | {"modality_weights": "all"}
    run = start(run_values, stop_after=1)
    run_values["model"]["modality_weights"] = "none"
    run_values["train"]["init_from"] = str(run)
    message = r"(?s)does not fit the model.*blocks\.\*\.attention\.out\.image_weight"
    with pytest.raises(UserError, match=message):
        start(run_values, out=str(tmp_path / "other"))


@pytest.mark.parametrize(
    ("train_keys", "message"),
    [({"lora": {"rank": 2}}, r"train\.lora"), ({"precision": "fp8"}, r"train\.precision fp8")],
)
def test_what_does_not_go_together_is_refused(run_values, train_keys, message):
    run_values["model"]["modality_weights"] = "all"
    run_values["train"] |= train_keys
    with pytest.raises(UserError, match=message + " is not supported with model.modality_weights all"):
        start(run_values)
