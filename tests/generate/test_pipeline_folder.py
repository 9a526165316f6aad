"""Pipeline folders: saved and loaded, invalid, written by an earlier version; importing the pipeline."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from megafusion.errors import UserError
from megafusion.generate.pipeline import TransfusionPipeline
from megafusion.sequence.tokenizer import Tokenizer
from tests.support.generation import make_pipeline

VERSION_1 = {
    "format": "megafusion-pipeline/1",
    "image_size": [64, 64],
    "model": {
        "num_layers": 6,
        "width": 192,
        "num_heads": 6,
        "num_kv_heads": None,
        "hidden_width": 512,
        "vocab_size": 2048,
        "latent_shape": [3, 16, 16],
        "more_sizes": [],
        "patch_size": 4,
        "adapter": "linear",
        "unet_channels": 320,
        "attention": "sdpa",
        "rope_theta": 10000.0,
        "norm_epsilon": 0.00001,
    },
    "objective": {
        "image_weight": 5.0,
        "schedule": {
            "beta_schedule": "squaredcos_cap_v2",
            "num_steps": 1000,
            "prediction": "v_prediction",
        },
    },
    "sampling": {"sampler": "dpm++", "num_steps": 25, "guidance": 2.0, "max_new_tokens": 24},
}
"""config.json as version 1 wrote it."""
RENAMED = {
    "image_size": "model.image_sizes",
    "model.width": "model.hidden_size",
    "model.hidden_width": "model.ffn_hidden_size",
    "model.norm_epsilon": "model.norm_eps",
    "model.more_sizes": "model.image_sizes",
    "objective.schedule": "objective.noise_process",
    "sampling.num_steps": "sampling.num_inference_steps",
    "sampling.guidance": "sampling.guidance_scale",
}


@pytest.fixture(
    params=[{"tie_embeddings": True}, {"adapter": "unet", "unet_channels": 4}], ids=["tied", "unet"]
)
def pipeline(request, run_config, tokenizer, codec) -> TransfusionPipeline:
    return make_pipeline(run_config, tokenizer, codec, num_steps=5, **request.param)


def test_a_saved_pipeline_loads_and_draws_the_same(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "pipeline")
    loaded = TransfusionPipeline.from_pretrained(tmp_path / "pipeline")
    a, b = (np.asarray(p.draw(["apple"])[0]) for p in (pipeline, loaded))
    assert np.array_equal(a, b)
    assert not list(tmp_path.glob("*.partial"))


def test_weights_are_the_same_after_a_generation(pipeline, tmp_path):
    """Which stores them in another order."""
    before = {name: weight.clone() for name, weight in pipeline.model.weights().items()}
    pipeline.draw(["red apple"])
    pipeline.save_pretrained(tmp_path / "p")
    loaded = TransfusionPipeline.from_pretrained(tmp_path / "p")
    for name, weight in pipeline.model.weights().items():
        assert torch.equal(weight, before[name])
        assert torch.equal(loaded.model.weights()[name], before[name])


def test_an_invalid_pipeline_folder_is_named(pipeline, tmp_path):
    with pytest.raises(UserError, match="nowhere: neither a pipeline folder, a run folder nor a checkpoint"):
        TransfusionPipeline.from_pretrained(tmp_path / "nowhere")
    folder = tmp_path / "pipeline"
    pipeline.save_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match="not a readable pipeline"):
        TransfusionPipeline.from_pretrained(folder)


def test_a_folder_of_version_1_is_refused_with_the_new_keys(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(VERSION_1))
    with pytest.raises(UserError) as caught:
        TransfusionPipeline.from_pretrained(tmp_path)
    lines = str(caught.value).splitlines()
    for old, new in RENAMED.items():
        assert f"{path}: key {old!r} was renamed: it is {new!r} now" in lines
    assert any("'model.latent_shape' was renamed" in line for line in lines)
    assert any("'megafusion-pipeline/1'" in line for line in lines)


def test_a_tokenizer_of_another_size_is_refused(pipeline, codec):
    other = Tokenizer(Path("other.model"), "hash", num_text_ids=98, bos=1, eos=2)
    with pytest.raises(UserError, match=r"vocab_size 2048, but other\.model has 100 ids"):
        TransfusionPipeline(pipeline.model, other, codec, pipeline.config)


@pytest.mark.parametrize(
    ("num_text_ids", "is_padded"), [(1022, True), (1021, False), (2046, True), (2047, False)]
)
def test_a_padded_vocabulary(pipeline, codec, num_text_ids, is_padded):
    """Of 2,048 rows, at most 1,024 more than ids."""
    other = Tokenizer(Path("other.model"), "hash", num_text_ids, bos=1, eos=2)
    if is_padded:
        TransfusionPipeline(pipeline.model, other, codec, pipeline.config)
        return
    with pytest.raises(
        UserError, match=rf"2048, but .* {num_text_ids + 2} ids .*up to {num_text_ids + 1026} where"
    ):
        TransfusionPipeline(pipeline.model, other, codec, pipeline.config)


def test_importing_the_pipeline_imports_no_slow_package_but_torch():
    code = "import sys; from megafusion import TransfusionPipeline; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    slow = {"diffusers", "scipy", "torch._dynamo", "torch.utils.tensorboard", "deepspeed", "webdataset"}
    assert not slow & set(done.stdout.split())
