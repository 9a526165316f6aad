"""Frozen weights stay as they started, and are saved without moments and average."""

from pathlib import Path

import pytest
import torch

from megafusion.checkpoint.folder import complete_checkpoints
from megafusion.checkpoint.tensor_list import read_shapes
from megafusion.errors import UserError
from megafusion.generate.pipeline import TransfusionPipeline
from megafusion.train.open_model import open_checkpoint
from megafusion.train.parts import check_parts
from tests.support.marks import full
from tests.support.runs import assert_resumes, parsed, start
from tests.support.small import small_run
from tests.support.texts import text_logits

TEXT_PATH = ["stem.embedding.*", "blocks.*", "tail.norm.*", "tail.head.*"]
"""Everything but the image adapters. A text's logits depend on nothing else."""


@pytest.fixture(scope="module")
def trained(shards, vae_folder, tmp_path_factory) -> Path:
    """A finished run to start from."""
    return start(small_run(shards, vae_folder, tmp_path_factory.mktemp("trained") / "run"))


@pytest.mark.parametrize("num_steps", [5, *full(100)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_frozen_weights_and_what_they_compute_stay_bit_for_bit(run_values, trained, num_steps, precision):
    run_values["train"] |= {"freeze": TEXT_PATH, "init_from": str(trained), "num_steps": num_steps}
    run_values["train"] |= {"precision": precision}
    run = start(run_values)
    (*_, last) = complete_checkpoints(run / "checkpoints")
    began, now = TransfusionPipeline.from_pretrained(trained), TransfusionPipeline.from_pretrained(run)
    train_config = parsed(run_values).train
    for model in (now.model, open_checkpoint(last, "model").model):
        for name, weight in began.model.weights().items():
            expected = weight if precision == "fp32" else weight.bfloat16().float()
            is_same = torch.equal(model.weights()[name], expected)
            assert is_same != train_config.trains(name), name
    if precision == "fp32":
        assert torch.equal(text_logits(now.model), text_logits(began.model))
    shapes = read_shapes(last)
    frozen = [name for name in began.model.weights() if not train_config.trains(name)]
    kinds = {
        name: {kind for kind in ("model", "ema", "exp_avg", "exp_avg_sq") if f"{kind}.{name}" in shapes}
        for name in began.model.weights()
    }
    assert all(kinds[name] == {"model"} for name in frozen)
    assert all(len(kinds[name]) == 4 for name in kinds.keys() - set(frozen))


def test_a_run_with_frozen_weights_resumes_bit_for_bit(run_values, tmp_path):
    run_values["train"] |= {"freeze": ["stem.*", "*.qkv.weight"]}
    assert_resumes(run_values, tmp_path / "again")


@pytest.mark.parametrize(
    ("freeze", "pipeline", "message"),
    [
        (
            ["blocks.*.atention.*"],
            1,
            r"train\.freeze 'blocks.*no weight .* blocks\.\d\.attention\.\w+\.weight",
        ),
        (["*"], 1, r"matches every weight of the model, so nothing is left to train"),
        (
            ["stem.*", "blocks.0.*"],
            2,
            r"nothing to train in stage 0 of parallel\.pipeline 2 \(blocks 0 to 0\)",
        ),
        (
            ["blocks.1.*", "tail.*"],
            2,
            r"nothing to train in stage 1 of parallel\.pipeline 2 \(blocks 1 to 1\)",
        ),
    ],
)
def test_what_cannot_be_frozen_is_refused(run_values, freeze, pipeline, message):
    run_values["train"] |= {"freeze": freeze}
    with pytest.raises(UserError, match=message):
        check_parts(parsed(run_values | {"parallel": {"pipeline": pipeline}}))
    if pipeline == 1:
        with pytest.raises(UserError, match=message):
            start(run_values)
        assert not (Path(run_values["out"]) / "config.yaml").exists()


def test_frozen_weights_are_of_the_runs_recipe(run_values):
    start(run_values, stop_after=1)
    run_values["train"] |= {"freeze": ["stem.*"]}
    with pytest.raises(UserError, match=r"other values of train\.freeze"):
        start(run_values)
