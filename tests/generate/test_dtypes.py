"""A pipeline moved to a device or dtype, whole or in part, generates."""

import numpy as np
import pytest
import torch
from PIL import Image

from megafusion.config import parse_config
from megafusion.generate.pipeline import TransfusionPipeline
from megafusion.images.codec import ImageCodec
from megafusion.train.config import RunConfig
from tests.support.generation import make_pipeline

MOVES = {
    "dtype": lambda p: p.to(torch.bfloat16),
    "keyword": lambda p: p.to(dtype=torch.float16),
    "both": lambda p: p.to("cpu", torch.bfloat16),
    "device": lambda p: p.to(torch.device("cpu")),
    "float64": lambda p: p.to(torch.float64),
    "model alone": lambda p: p.model.to(torch.bfloat16),
    "autoencoder alone": lambda p: torch.nn.Module.to(p.codec.model, torch.bfloat16),
    "there and back": lambda p: p.to(torch.float64).to(torch.float32),
}


@pytest.fixture
def run_config(run_values) -> RunConfig:
    # A random model's noise prediction is amplified beyond float16.
    run_values["objective"] = {"noise_process": {"prediction_type": "v_prediction"}}
    return parse_config(RunConfig, run_values, "test")


@pytest.mark.parametrize("adapter", ["linear", "unet"])
@pytest.mark.parametrize("move", MOVES)
def test_a_moved_pipeline_generates(run_config, tokenizer, vae_folder, move, adapter, caplog):
    codec = ImageCodec.from_pretrained(vae_folder)  # of this test alone, which moves it
    options = {"num_steps": 3, "adapter": adapter, "unet_channels": 4}
    pipeline: TransfusionPipeline = make_pipeline(run_config, tokenizer, codec, **options)
    noise = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    (expected,) = pipeline.draw(["red apple"])
    MOVES[move](pipeline)
    (drawn,) = pipeline.draw(["red apple"])
    # A random model amplifies rounding; a wrong dtype of a part would draw noise.
    error = np.abs(np.asarray(drawn, float) - np.asarray(expected, float)).mean()
    assert error <= (0.5 if move in ("device", "float64", "there and back") else 20), error
    assert len(pipeline.describe([drawn, Image.fromarray(noise)])) == 2
    assert len(pipeline.generate([["x", drawn, "and"]], begin="image")[0]) >= 1
    assert not caplog.records


def test_a_saved_half_precision_pipeline_loads(run_config, tokenizer, vae_folder, tmp_path):
    pipeline = make_pipeline(run_config, tokenizer, ImageCodec.from_pretrained(vae_folder), num_steps=2)
    pipeline.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    again = TransfusionPipeline.from_pretrained(tmp_path / "half")
    first, second = (np.asarray(p.draw(["x"])[0], float) for p in (pipeline, again))
    assert np.abs(first - second).mean() < 20
