"""A run starts from the weights of another model at any topology, or is refused before it writes anything."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from megafusion.checkpoint.folder import complete_checkpoints
from megafusion.checkpoint.manager import CheckpointManager
from megafusion.engine.ema import Ema
from megafusion.engine.process_group import start_process_group
from megafusion.errors import UserError
from megafusion.generate.pipeline import TransfusionPipeline
from megafusion.hub.config import model_keys, read_hub_config
from megafusion.model.hub_names import hub_names
from megafusion.model.transfusion import Transfusion
from megafusion.parallel.mesh import make_mesh
from megafusion.telemetry.metrics_file import read_metrics
from megafusion.train.build import build_components, build_engine
from megafusion.train.config import RunConfig
from megafusion.train.init_from import open_origin
from megafusion.train.loop import train, train_step
from megafusion.train.open_model import open_checkpoint
from tests.parallel.cases import weights_of
from tests.support.checkpoints import load_full_tensors
from tests.support.hub import IMAGES, load_here, make_folder
from tests.support.marks import full
from tests.support.runs import parsed, start
from tests.support.small import TOKENIZER, small_run
from tests.support.weights import initialize
from tests.support.workers import run_workers

NEW = ["*.adapter.*", "stem.embedding.weight", "tail.head.weight"]


def from_hub(values: dict, folder: Path, **changes) -> dict:
    """A run's values that start from a folder of transformers."""
    keys = IMAGES | model_keys(read_hub_config(folder), folder) | changes
    new = NEW[:2] if keys["tie_embeddings"] else NEW
    return values | {"model": keys, "train": values["train"] | {"init_from": str(folder), "init_new": new}}


def evaluate(model: Transfusion, values: dict) -> list[float]:
    """Text and image loss of a run's first global batch."""
    start_process_group()
    config = parsed(values | {"parallel": {}, "out": values["out"] + "-evaluated"})
    micro_batches = build_components(config, make_mesh(config.parallel)).loader.next()
    counts = torch.stack([batch.counts() for batch in micro_batches]).sum(0)
    sums = torch.zeros(4)
    for batch in micro_batches:
        batch.num_text_targets, batch.num_images = counts.unbind()
        with torch.no_grad():
            sums += torch.stack(model(batch))
    return sums[:2].tolist()


def first_losses(run: Path) -> list[float]:
    first = read_metrics(run)[0]
    return [first["text_loss"], first["image_loss"]]


def random_beside(folder: Path, config: RunConfig) -> Transfusion:
    """The model of a folder, with what it lacks as a start at random has it."""
    model = Transfusion(config.model, config.objective)
    initialize(model, config.model.num_layers, config.seed)
    weights, theirs = model.weights(), load_here(folder).state_dict()
    for name in hub_names(weights):
        weights[name][: len(theirs[name])] = theirs[name]
    return model


def step_from_hub(values: dict) -> tuple[list, list]:
    """This rank's weights before the first step, and the losses of it."""
    config = parsed(values)
    mesh = make_mesh(config.parallel)
    loader = build_components(config, mesh).loader
    engine = build_engine(config, mesh)
    state = engine.optimizer_state
    origin = open_origin(config)
    manager = CheckpointManager(config.out, state, Ema(state.shards, 0.9), config.checkpoint)
    manager.initialize(origin.source, origin.names)
    weights = weights_of(engine)
    return weights, [float(loss) for loss in train_step(engine, loader.next(), 1e-3)][:2]


@pytest.mark.parametrize(
    ("family", "world", "degrees"),
    [
        ("qwen3", 2, {"zero_stage": 3}),
        *full(
            ("qwen3", 4, {"tensor": 2, "pipeline": 2}),
            ("qwen3", 2, {"tensor": 2}),
            ("qwen3", 2, {"ulysses": 2}),
            ("qwen2", 2, {"tensor": 2, "sequence": True}),
            ("qwen2", 2, {"pipeline": 2}),
            ("qwen2", 2, {"zero_stage": 0}),
            ("llama3", 4, {"tensor": 2, "zero_stage": 3}),
            ("mistral", 4, {"tensor": 2, "pipeline": 2}),
        ),
    ],
)
def test_any_topology_starts_from_shards(run_values, tmp_path, family, world, degrees):
    """Each rank has its part of each weight bit for bit, and the loss of the first step is one device's."""
    folder = tmp_path / "hub"
    make_folder(folder, family, shard_size="50KB")
    assert len(list(folder.glob("model-*.safetensors"))) >= 3
    # An untied model from tied weights where there are stages.
    untied = {"tie_embeddings": False} if "pipeline" in degrees else {}
    values = from_hub(run_values, folder, **untied) | {"parallel": degrees}
    values["train"]["init_new"] = NEW[:2] if values["model"]["tie_embeddings"] else NEW
    values["train"] |= {"global_batch_size": 4, "micro_batch_size": 1}
    model = random_beside(folder, parsed(values))
    expected = evaluate(model, values)
    for weights, losses in run_workers(step_from_hub, world, values):
        assert losses == pytest.approx(expected, abs=1e-5)
        for name, spec, shard in weights:
            assert torch.equal(shard, spec.shard(model.weights()[name])), name


@pytest.fixture(scope="module")
def trained(shards, vae_folder, tmp_path_factory) -> Path:
    """A finished run of our own, whose averaged weights differ from the raw ones."""
    return start(small_run(shards, vae_folder, tmp_path_factory.mktemp("trained") / "run"))


def next_run(values: dict, init_from: Path, **changes) -> dict:
    """Another run: other data order and batch size, from a run's model."""
    values["train"] |= {"init_from": str(init_from), "global_batch_size": 2, "num_steps": 2, **changes}
    return values | {"seed": 5, "checkpoint": {"every": 1, "keep_last": 9}}


@pytest.mark.parametrize("origin", ["run", "pipeline", "raw"])
def test_the_first_step_has_the_losses_of_the_model_it_starts_from(run_values, trained, origin):
    path = trained / "pipeline" if origin == "pipeline" else trained
    values = next_run(run_values, path, **({"init_weights": "raw"} if origin == "raw" else {}))
    train(parsed(values), stop_after=1)
    checkpoint = complete_checkpoints(trained / "checkpoints")[-1]
    kind = "model" if origin == "raw" else "ema"
    model = open_checkpoint(checkpoint, kind).model
    other = open_checkpoint(checkpoint, "ema" if origin == "raw" else "model").model
    found = first_losses(Path(values["out"]))
    assert found == pytest.approx(evaluate(model, values), abs=1e-6)
    assert found != pytest.approx(evaluate(other, values), abs=1e-4)
    # The average starts there too.
    (first,) = complete_checkpoints(Path(values["out"]) / "checkpoints")
    shapes = {name: tensor.shape for name, tensor in model.weights().items()}
    averages, weights = (load_full_tensors(first, shapes, kind) for kind in ("ema", "model"))
    for name, began in model.weights().items():
        expected = began.lerp(weights[name], 1 - 2 / 11)  # the first decay
        torch.testing.assert_close(averages[name], expected, rtol=0, atol=1e-6)


def test_a_resumed_run_continues_without_what_it_started_from(run_values, trained, tmp_path, capsys):
    origin = shutil.copytree(trained / "pipeline", tmp_path / "origin")
    values = next_run(run_values, origin)
    train(parsed(values), stop_after=1)
    assert f"starts from {origin}\n" in capsys.readouterr().err
    shutil.rmtree(origin)
    assert train(parsed(values)) == "finished"
    assert "starts from" not in capsys.readouterr().err
    run = Path(values["out"])
    assert json.loads((run / "environment.json").read_text())["init_from"]["path"] == str(origin)
    values["train"]["init_from"] = str(tmp_path)
    assert train(parsed(values)) == "finished"
    shutil.rmtree(run / "checkpoints")  # without one, it would start from something else
    values["train"]["init_from"] = str(trained)
    with pytest.raises(UserError, match=r"other values of train\.init_from"):
        train(parsed(values))


def test_what_a_text_model_was_is_recorded_over_runs(run_values, tmp_path, capsys):
    make_folder(tmp_path / "hub", "llama3")
    values = from_hub(run_values, tmp_path / "hub", rope_theta=1e6)
    values["train"]["num_steps"] = 1
    train(parsed(values))
    said = capsys.readouterr().err
    assert "; model.rope_theta 1000000.0 instead of 500000.0; at random stem.adapter." in said
    again = values | {"out": str(tmp_path / "again")}
    again["train"] = values["train"] | {"init_from": values["out"] + "/pipeline", "init_new": []}
    train(parsed(again))
    first, second = (
        json.loads((Path(run["out"]) / "environment.json").read_text())["init_from"]
        for run in (values, again)
    )
    assert first["text_config"]["model_type"] == "llama"
    assert second["text_config"] == first["text_config"]
    assert (first["new"][0], second["new"]) == ("stem.adapter.linear.bias", [])


@pytest.mark.parametrize(("limit", "scaling"), [(64, False), (64, True), (96, False)])
def test_rows_longer_than_the_text_model_knows_are_warned_of(run_values, tmp_path, capsys, limit, scaling):
    make_folder(tmp_path / "hub", "llama3" if scaling else "llama2")
    edit(tmp_path / "hub", max_position_embeddings=limit)
    train(parsed(from_hub(run_values, tmp_path / "hub")), stop_after=1)
    said = "data.sequence_length 96 is more than the 64 positions" in capsys.readouterr().err
    assert said == (limit == 64 and not scaling)


def edit(folder: Path, **changes) -> None:
    """Change keys of config.json; ... drops one."""
    path = folder / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def truncated(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-100])


def without(folder: Path, name: str, more: dict | None = None) -> None:
    weights = load_file(folder / "model.safetensors")
    weights.pop(name)
    save_file(weights | (more or {}), folder / "model.safetensors", {"format": "pt"})


def fewer_ids(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = weights[name][:2000].clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    edit(folder, vocab_size=2000)


def padded(folder: Path) -> None:
    """More rows than token ids, as Qwen 2.5 has."""
    weights = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = torch.cat([weights[name], torch.randn(54, 32)])
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    edit(folder, vocab_size=2100)


ROPE = {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}
BAD = {
    "pickles": (pickled, r"weights are pickles.*python -c \"from transformers"),
    "nothing": (lambda f: (f / "model.safetensors").unlink(), r"no model\.safetensors.*name a folder of"),
    "truncated": (truncated, r"model\.safetensors: truncated or damaged.*fetch it again"),
    "architecture": (
        lambda f: edit(f, architectures=["GPT2LMHeadModel"]),
        r"architecture GPT2LMHeadModel is not supported; supported: LlamaForCausalLM, .*Qwen3ForCausalLM",
    ),
    "no architecture": (
        lambda f: edit(f, architectures=[]),
        r"not the configuration of one transformers model",
    ),
    "bad json": (lambda f: (f / "config.json").write_text("{"), r"config\.json: cannot be read as JSON"),
    "missing key": (
        lambda f: edit(f, rms_norm_eps=...),
        r"config\.json: no rms_norm_eps; give the model's own",
    ),
    "vocabulary": (lambda f: edit(f, vocab_size=2050), r"vocab_size 2050, but the embedding has 2046 rows"),
    "rope": (lambda f: edit(f, **ROPE), r"rope scaling yarn is not supported; llama3 is, and none"),
    "old rope": (
        lambda f: edit(f, rope_parameters=None, rope_scaling={"type": "linear", "factor": 2.0}),
        r"rope scaling linear is not supported",
    ),
    "window": (
        lambda f: edit(f, architectures=["MistralForCausalLM"], sliding_window=64),
        r"sliding_window 64 is less than data\.sequence_length 96.*to at most 64",
    ),
    "bias": (lambda f: edit(f, attention_bias=True), r"attention_bias True is not supported"),
    "activation": (
        lambda f: edit(f, hidden_act="gelu"),
        r"hidden_act gelu is not supported; a model with silu is",
    ),
    "quantized": (
        lambda f: edit(f, quantization_config={"bits": 4}),
        r"quantization_config .* is not supported",
    ),
    "no tokenizer": (
        lambda f: (f / "tokenizer.model").unlink(),
        r"no tokenizer\.model or tokenizer\.json; put the model's tokenizer there",
    ),
    "fewer ids": (
        fewer_ids,
        r"2000 token ids, but its tokenizer .* has 2046; give the tokenizer that it was",
    ),
    "more rows": (
        padded,
        r"(?s)stem\.embedding\.weight has shape \[2100, 32\] there, but has shape \[2048, 32\] in this .*; "
        r"set model\.vocab_size: 2100.*tail\.head\.weight has shape .*; set model\.vocab_size: 2100",
    ),
    "a tensor less": (
        lambda f: without(f, "model.layers.1.mlp.up_proj.weight"),
        r"blocks\.\*\.feed_forward\.gate_up\.weight is missing there, but has shape \[128, 32\] in this "
        r"model\n  model\.layers\.1\.mlp\.gate_proj\.weight has shape \[64, 32\] there, but is missing",
    ),
    "no head": (
        lambda f: without(f, "lm_head.weight"),
        r"tail\.head\.weight is missing there, but has shape \[2048, 32\] in this model",
    ),
    "a tensor more": (
        lambda f: without(f, "lm_head.weight", {"model.layers.2.mlp.down_proj.weight": torch.zeros(32, 64)}),
        r"model\.layers\.2\.mlp\.down_proj\.weight has shape \[32, 64\] there, but is missing in this model",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_folder_is_refused(run_values, tmp_path, name):
    spoil, message = BAD[name]
    folder = tmp_path / "hub"
    make_folder(folder, "llama2")
    values = from_hub(run_values, folder)
    spoil(folder)
    refused(values, message)


def test_a_padded_vocabulary_of_the_same_size_is_loaded_whole(run_values, tmp_path):
    folder = tmp_path / "hub"
    make_folder(folder, "llama2")
    padded(folder)
    train(parsed(from_hub(run_values, folder, vocab_size=2100)), stop_after=1)
    record = json.loads((Path(run_values["out"]) / "environment.json").read_text())["init_from"]
    assert not {"stem.embedding.weight", "tail.head.weight"} & set(record["new"])


def refused(values: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        train(parsed(values))
    assert not Path(values["out"]).exists()


def test_a_bad_shard_is_named(run_values, tmp_path):
    folder = tmp_path / "hub"
    make_folder(folder, "llama2", shard_size="50KB")
    values = from_hub(run_values, folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shard = index["weight_map"]["model.norm.weight"]
    moved = (folder / shard).rename(folder / "elsewhere")
    refused(values, rf"{shard}: missing, but model\.safetensors\.index\.json names it; fetch it again")
    others = sorted(set(index["weight_map"].values()) - {shard})
    shutil.copyfile(folder / others[0], folder / shard)
    refused(values, r"is in model\.safetensors\.index\.json, but in none of its files")
    moved.replace(folder / shard)
    (folder / "model.safetensors.index.json").write_text("[]")
    refused(values, r"model\.safetensors\.index\.json: damaged")


@pytest.mark.parametrize(
    ("model", "training", "message"),
    [
        (
            {},
            {"init_new": []},
            r"(?s)does not fit.*stem\.embedding\.weight has shape \[2046, 32\] there, but .*2048",
        ),
        ({}, {"init_new": ["*.adpter.*"]}, r"train\.init_new '\*\.adpter\.\*': no weight of the model"),
        (
            {"num_heads": 8, "head_dim": 4, "num_kv_heads": 8},
            {},
            r"num_heads 8 instead of 4, model\.num_kv_heads 8 .*model\.head_dim 4",
        ),
        ({"norm_eps": 1e-3}, {}, r"norm_eps 0\.001 instead of 1e-06, which .* was trained with"),
        ({"num_layers": 3}, {}, r"blocks\.\*\.attention\.out\.weight is missing there"),
        (
            {"num_layers": 1},
            {},
            r"model\.layers\.1\.input_layernorm\.weight has shape \[32\] there, but is missing",
        ),
        (
            {"qk_norm": True},
            {},
            r"q_norm\.weight is missing there, but has shape \[8\] in this model \(2 blocks\)",
        ),
        ({}, {"init_weights": "raw"}, r"init_weights raw: .* has one kind of weights"),
        ({}, {"init_from": "nowhere"}, r"nowhere: neither a pipeline folder, a run folder, a checkpoint"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(run_values, tmp_path, model, training, message):
    make_folder(tmp_path / "hub", "llama2")
    values = from_hub(run_values, tmp_path / "hub", **model)
    values["train"] |= training
    refused(values, message)


def test_another_tokenizer_is_refused(run_values, tmp_path):
    make_folder(tmp_path / "hub", "llama2")
    values = from_hub(run_values, tmp_path / "hub")
    model = ModelProto.FromString(TOKENIZER.read_bytes())
    model.pieces[300].piece, model.pieces[301].piece = model.pieces[301].piece, model.pieces[300].piece
    (tmp_path / "hub/tokenizer.model").write_bytes(model.SerializeToString())
    refused(values, "not the tokenizer of train.init_from")


def test_a_damaged_checkpoint_is_refused(run_values, trained, tmp_path):
    copied = shutil.copytree(trained, tmp_path / "copied")
    newest = complete_checkpoints(copied / "checkpoints")[-1]
    with next(newest.glob("tensors/*.distcp")).open("r+b") as file:
        file.seek(2000)
        file.write(b"x" * 8)
    with pytest.raises(UserError, match="damaged: size or SHA-256"):
        train(parsed(next_run(run_values, copied)))


def test_another_adapter_starts_at_random_and_the_rest_does_not(run_values, trained):
    values = next_run(run_values, trained, init_new=["*.adapter.*"])
    values["model"] |= {"adapter": "unet", "unet_channels": 8}
    train(parsed(values), stop_after=1)
    pipeline = TransfusionPipeline.from_pretrained(trained / "pipeline")
    model = Transfusion(parsed(values).model, pipeline.config.objective)
    initialize(model, 2, seed=5)
    began, shared = pipeline.model.weights(), []
    for name, tensor in model.weights().items():
        if name in began and began[name].shape == tensor.shape:
            tensor.copy_(began[name])
            shared += [name] if ".adapter." in name else []
    assert shared  # what both kinds of adapters have, such as the timestep's embedding, is loaded
    assert first_losses(Path(values["out"])) == pytest.approx(evaluate(model, values), abs=1e-6)


def test_a_pipeline_of_fewer_image_sizes_gives_its_rows(run_values, trained):
    """The boi of a second size is a new id, whose row may start at random."""
    values = next_run(
        run_values, trained / "pipeline", init_new=["stem.embedding.weight", "tail.head.weight"]
    )
    values["model"] |= {"image_sizes": [[32, 32], [16, 16]], "vocab_size": 2049}
    train(parsed(values), stop_after=1)
    record = json.loads((Path(values["out"]) / "environment.json").read_text())["init_from"]
    assert record["new"] == ["stem.embedding.weight from row 2048", "tail.head.weight from row 2048"]
    assert record["changed"] == {"model.image_sizes": ["((32, 32),)", "((32, 32), (16, 16))"]}
    pipeline = TransfusionPipeline.from_pretrained(trained / "pipeline")
    with torch.no_grad():
        model = Transfusion(parsed(values).model, pipeline.config.objective)
        initialize(model, 2, seed=5)
        for name, tensor in model.weights().items():
            began = pipeline.model.weights()[name]
            tensor[: len(began)] = began
    assert first_losses(Path(values["out"])) == pytest.approx(evaluate(model, values), abs=1e-6)
