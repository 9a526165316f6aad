"""LoRA: the base is frozen, runs resume bit for bit, and what is published computes what was trained."""

from pathlib import Path

import pytest
import torch

from megafusion.checkpoint.folder import complete_checkpoints
from megafusion.checkpoint.reader import CheckpointWeights, fill_tensors
from megafusion.errors import UserError
from megafusion.generate.pipeline import TransfusionPipeline
from megafusion.model.lora import add_lora
from megafusion.model.transfusion import Transfusion
from megafusion.parallel.dropout import seed_dropout
from megafusion.parallel.mesh import make_mesh
from megafusion.parallel.sharding import ShardSpec
from megafusion.train.build import build_engine
from megafusion.train.export import export_adapter, export_pipeline
from megafusion.train.loop import train_step
from megafusion.train.parts import check_parts
from megafusion.train.run_folder import load_run_config
from tests.parallel.cases import Batches, weights_of
from tests.support.marks import full
from tests.support.runs import assert_resumes, parsed, start
from tests.support.small import small_run
from tests.support.texts import text_logits
from tests.support.workers import run_workers

LORA = {"rank": 2, "alpha": 8.0}


@pytest.fixture(scope="module")
def base(shards, vae_folder, tmp_path_factory) -> Path:
    """A finished run to adapt."""
    return start(small_run(shards, vae_folder, tmp_path_factory.mktemp("base") / "run"))


@pytest.fixture(scope="module")
def adapted(shards, vae_folder, base, tmp_path_factory) -> Path:
    """A finished LoRA run from it, whose updates are far from zero."""
    values = small_run(shards, vae_folder, tmp_path_factory.mktemp("adapted") / "run")
    values["train"] |= {"init_from": str(base), "lora": LORA, "ema_decay": 0.5}
    values["optimizer"] |= {"learning_rate": 3e-2}
    return start(values)


def unmerged(run: Path) -> Transfusion:
    """The averaged model as it is trained: layers with their updates beside them."""
    config = load_run_config(run)
    model = add_lora(Transfusion(config.model, config.objective), config.train.lora)
    weights = CheckpointWeights(complete_checkpoints(run / "checkpoints")[-1], "ema")
    fill_tensors(weights, model.weights())
    return model.eval()


def test_merged_equals_unmerged(base, adapted):
    logits = text_logits(unmerged(adapted))
    torch.testing.assert_close(
        text_logits(TransfusionPipeline.from_pretrained(adapted).model), logits, rtol=0, atol=1e-5
    )
    distance = (logits - text_logits(TransfusionPipeline.from_pretrained(base).model)).abs().max()
    assert distance > 0.1


def test_all_but_the_linear_layers_of_blocks_is_the_bases(base, adapted):
    before, after = (TransfusionPipeline.from_pretrained(run).model.weights() for run in (base, adapted))
    assert before.keys() == after.keys()
    for name, weight in before.items():
        is_adapted = name.startswith("blocks.") and "norm" not in name
        assert torch.equal(weight, after[name]) != is_adapted, name


def test_adapters_by_name_and_strength(base, adapted):
    pipeline, merged = (TransfusionPipeline.from_pretrained(run) for run in (base, adapted))
    before = {name: weight.clone() for name, weight in pipeline.model.weights().items()}
    pipeline.load_lora_weights(adapted, adapter_name="a")
    expected = merged.model.weights()
    for name, weight in pipeline.model.weights().items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-6)
    pipeline.load_lora_weights(adapted / "lora", adapter_name="b")
    assert pipeline.get_active_adapters() == pipeline.get_list_adapters() == ["a", "b"]
    pipeline.set_adapters(["a", "b"], [0.25, 0.5])
    for name, weight in pipeline.model.weights().items():
        update = expected[name] - before[name]
        torch.testing.assert_close(weight - before[name], 0.75 * update, rtol=0, atol=1e-6)
    pipeline.set_adapters("b", -1.0)
    assert pipeline.get_active_adapters() == ["b"]
    name = "blocks.0.attention.qkv.weight"
    torch.testing.assert_close(
        pipeline.model.weights()[name], 2 * before[name] - expected[name], rtol=0, atol=1e-6
    )
    pipeline.unload_lora_weights()
    assert pipeline.get_list_adapters() == []
    assert all(torch.equal(weight, before[name]) for name, weight in pipeline.model.weights().items())


def test_wrong_calls_are_refused(base, adapted, tmp_path):
    pipeline = TransfusionPipeline.from_pretrained(base)
    pipeline.load_lora_weights(adapted, "heart")
    before = text_logits(pipeline.model)
    for call, message in (
        (lambda: pipeline.load_lora_weights(adapted, "heart"), r"'heart': an adapter of that name is loaded"),
        (lambda: pipeline.load_lora_weights(tmp_path), r"no adapter_config\.json"),
        (lambda: pipeline.set_adapters(["hearts"]), r"'hearts' is not loaded; loaded are heart"),
        (lambda: pipeline.set_adapters(["heart"], [1.0, 2.0]), r"a number for each of \['heart'\]"),
        (lambda: pipeline.set_adapters(["heart"], float("nan")), r"adapter_weights=nan"),
    ):
        with pytest.raises(UserError, match=message):
            call()
    assert torch.equal(text_logits(pipeline.model), before)


def test_exports(base, adapted, tmp_path):
    """--to pipeline --merge gives the published model, and --to peft the published adapter."""
    export_pipeline(base, tmp_path / "merged", [adapted])
    found = TransfusionPipeline.from_pretrained(tmp_path / "merged").model.weights()
    for name, weight in TransfusionPipeline.from_pretrained(adapted).model.weights().items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-6)
    export_adapter(adapted, tmp_path / "adapter")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "adapter" / name).read_bytes() == (adapted / "lora" / name).read_bytes()
    with pytest.raises(UserError, match=r"of a run without train\.lora, so there is no adapter"):
        export_adapter(base, tmp_path / "none")


@pytest.mark.parametrize("options", [{"dropout": 0.5, "targets": ["qkv", "down"]}, *full({})])
def test_a_run_resumes_bit_for_bit(run_values, tmp_path, options):
    run_values["train"] |= {"lora": LORA | options, "recompute": "full"}
    assert_resumes(run_values, tmp_path / "again")


def steps_with_dropout(values: dict) -> list[tuple[str, ShardSpec, torch.Tensor]]:
    """The weights after three steps."""
    config = parsed(values)
    mesh = make_mesh(config.parallel)
    batches, engine = Batches(values, mesh), build_engine(config, mesh)
    for number in range(3):
        seed_dropout(config.seed, number, mesh)
        train_step(engine, batches.next(), 1e-2)
    return weights_of(engine)


@pytest.mark.full
@pytest.mark.parametrize("sequence", [False, True])
def test_tensor_ranks_drop_alike_and_recomputation_drops_again(shards, vae_folder, tmp_path, sequence):
    values = small_run(shards, vae_folder, tmp_path / "run")
    values |= {"parallel": {"tensor": 2, "sequence": sequence}}
    values["train"] |= {"lora": LORA | {"dropout": 0.5}}
    first, second = run_workers(steps_with_dropout, 2, values)
    for (name, spec, weight), (_, _, other) in zip(first, second, strict=True):
        if weight.shape == spec.shape:
            assert torch.equal(weight, other), name
    values["train"] |= {"recompute": "full"}
    for (name, _, weight), (_, _, again) in zip(
        first, run_workers(steps_with_dropout, 2, values)[0], strict=True
    ):
        assert torch.equal(weight, again), name
    values["train"] |= {"lora": LORA}
    plain = {name: weight for name, _, weight in run_workers(steps_with_dropout, 2, values)[0]}
    assert any(not torch.equal(weight, plain[name]) for name, _, weight in first)


def test_a_run_may_start_from_a_lora_run(adapted, run_values):
    run_values["train"] |= {"init_from": str(adapted), "num_steps": 1}
    run_values["optimizer"] |= {"learning_rate": 1e-12, "final_learning_rate": 0.0}
    run = start(run_values)
    found = TransfusionPipeline.from_pretrained(run).model.weights()
    for name, weight in TransfusionPipeline.from_pretrained(adapted).model.weights().items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("train_keys", "parallel", "message"),
    [
        (
            {"lora": {"targets": ["attention.qvk"]}},
            {},
            r"'attention\.qvk': no linear .* attention\.qkv",
        ),
        ({"lora": {"targets": ["blocks.7.attention.out"]}}, {}, r"nearest is blocks\.\d\.attention\.out"),
        ({"lora": {"targets": ["stem.embedding"]}}, {}, r"no linear layer of the blocks"),
        ({"lora": {"targets": ["blocks.0.*"]}}, {"pipeline": 2}, r"targets.* nothing to train in stage 1"),
        (
            {"lora": {}, "freeze": ["stem.*"]},
            {},
            r"all weights but its own are frozen; leave",
        ),
        ({"lora": {}, "precision": "fp8"}, {}, r"train\.lora is not supported with train\.precision fp8"),
        ({"lora": {"rank": 0}}, {}, r"'train\.lora\.rank'"),
        ({"lora": {"targets": []}}, {}, r"'train\.lora\.targets'"),
        ({"lora": {"r": 8}}, {}, r"unknown key 'train\.lora\.r'; did you mean 'train\.lora\.rank'"),
    ],
)
def test_what_cannot_be_adapted_is_refused(run_values, train_keys, parallel, message):
    run_values["train"] |= train_keys
    with pytest.raises(UserError, match=message):
        check_parts(parsed(run_values | {"parallel": parallel}))
    if not parallel:
        with pytest.raises(UserError, match=message):
            start(run_values)
        assert not (Path(run_values["out"]) / "config.yaml").exists()
