"""Refusals of a run: before the first step, with the way out, and nothing lost."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

from megafusion.checkpoint.folder import complete_checkpoints, verify_checkpoint
from megafusion.checkpoint.reader import CheckpointWeights, fill_tensors
from megafusion.cli import app
from megafusion.config import parse_config
from megafusion.data.reader import ShardFolder
from megafusion.errors import UserError
from megafusion.telemetry.metrics_file import read_metrics
from megafusion.train.config import RunConfig
from tests.support.rows import write_shards
from tests.support.runs import parsed, start


@pytest.fixture
def own_shards(run_values, shards, tmp_path) -> Path:
    """The run's shards in a folder that a test may change."""
    folder = tmp_path / "shards"
    shutil.copytree(shards, folder)
    for name, source in run_values["data"]["sources"].items():
        source["path"] = str(folder / name)
    return folder


def test_other_shards_under_a_run_are_refused(run_values, own_shards):
    run = start(run_values, stop_after=2)
    source = ShardFolder(own_shards / "text")
    documents = [source.read(i) for i in (1, 0, *range(2, 8))]
    manifest = source.manifest.model_dump(include={"kind", "tokenizer_sha256", "provenance"})
    write_shards(own_shards / "text", documents, 8, **manifest)
    with pytest.raises(UserError, match=r"data\.sources\.text: other files than .* was started with"):
        start(run_values)
    assert len(read_metrics(run)) == 2


@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}"])
def test_a_run_without_its_record_is_refused(run_values, content):
    run = start(run_values, stop_after=1)
    (run / "environment.json").unlink()
    if content is not None:
        (run / "environment.json").write_text(content)
    with pytest.raises(
        UserError, match=r"environment\.json: cannot be read .*; restore it, or choose another"
    ):
        start(run_values)


def test_a_moved_run_goes_on(run_values, tmp_path):
    run = start(run_values, stop_after=2)
    run.rename(tmp_path / "elsewhere")
    assert len(read_metrics(start(run_values | {"out": str(tmp_path / "elsewhere")}))) == 6


def test_a_run_of_an_earlier_version_is_refused_with_the_new_keys_until_its_file_has_them(run_values):
    run = start(run_values, stop_after=2)
    current = (run / "config.yaml").read_text()
    frozen = yaml.safe_load(current)
    frozen["train"]["checkpoint_every"] = frozen.pop("checkpoint")["every"]
    frozen["model"]["width"] = frozen["model"].pop("hidden_size")
    (run / "config.yaml").write_text(yaml.safe_dump(frozen))
    generate = CliRunner().invoke(app, ["generate", str(run), "--prompt", "red apple"])
    with pytest.raises(UserError) as refused:
        start(run_values)
    renamed = {"train.checkpoint_every": "checkpoint.every", "model.width": "model.hidden_size"}
    for error in (refused.value, generate.exception):
        for old, new in renamed.items():
            assert f"{run}/config.yaml: key '{old}' was renamed: it is '{new}' now" in str(error)
    (run / "config.yaml").write_text(current)
    assert len(read_metrics(start(run_values))) == 6


def test_a_folder_that_is_no_run_is_left_alone(run_values):
    other = Path(run_values["out"])
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds other files"):
        start(run_values)
    assert [p.name for p in other.iterdir()] == ["thesis.txt"]


def test_a_folder_that_cannot_be_made_is_named(run_values, tmp_path):
    (tmp_path / "file").touch()
    run_values["out"] = str(tmp_path / "file" / "run")
    with pytest.raises(UserError, match=r"file/run: cannot be written \(Not a directory\)"):
        start(run_values)


def test_diverged_weights_never_push_out_a_good_checkpoint(run_values):
    run_values["checkpoint"] = {"every": 1, "keep_last": 1}
    run_values["telemetry"] = {"log_every": 5}
    run_values["optimizer"] = {"learning_rate": 1e30, "num_warmup_steps": 0, "gradient_clip": 0.0}
    with pytest.raises(UserError, match=r"5 consecutive .* rolled back to step 1, which is kept, before"):
        start(run_values)
    (kept,) = complete_checkpoints(Path(run_values["out"]) / "checkpoints")
    assert kept.name == "step-00000001"


def test_a_line_of_metrics_that_a_kill_cut_short_is_written_anew(run_values):
    run = start(run_values, stop_after=3)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "text_l')
    start(run_values)
    assert [line["step"] for line in read_metrics(run)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"files": {"a": {}}}'])
def test_a_damaged_manifest_of_a_checkpoint_is_named_with_the_earlier_one_if_there_is_one(
    run_values, content
):
    run = start(run_values, stop_after=1)
    start(run_values, stop_after=2)
    first, second = complete_checkpoints(run / "checkpoints")
    for checkpoint, way_out in ((second, "use the previous checkpoint"), (first, "restore this one from a")):
        (checkpoint / "manifest.json").write_text(content)
        with pytest.raises(UserError, match=rf"manifest\.json: damaged: .*{way_out}"):
            verify_checkpoint(checkpoint)


def test_a_checkpoint_of_another_model_is_named(run_values):
    run = start(run_values, stop_after=1)
    (checkpoint,) = complete_checkpoints(run / "checkpoints")
    with pytest.raises(UserError, match=r"holds another model: .* is missing in this model"):
        fill_tensors(CheckpointWeights(checkpoint, "ema"), {"no.such.weight": torch.zeros(1)})


@pytest.mark.parametrize("damage", ["missing", "short", "type", "order"])
def test_a_wrong_index_is_refused_at_start(run_values, own_shards, damage):
    index = own_shards / "pairs/shard-000001.index.npy"
    offsets = np.load(index)
    if damage == "missing":
        index.unlink()
    else:
        changed = {"short": offsets[:-1], "type": offsets.astype(np.float64), "order": offsets[::-1]}
        np.save(index, changed[damage])
    with pytest.raises(UserError, match=r"shard-000001\.index\.npy: .*preprocess again"):
        start(run_values)


def test_a_flipped_byte_in_a_shard_is_seen_by_its_hash(own_shards):
    folder = ShardFolder(own_shards / "pairs")
    assert folder.is_intact()
    path = own_shards / "pairs/shard-000000.tar"
    content = bytearray(path.read_bytes())
    content[700] ^= 1
    path.write_bytes(content)
    assert not ShardFolder(own_shards / "pairs").is_intact()


@pytest.mark.parametrize(
    ("room", "values", "message"),
    [
        ("model", {"num_heads": 0}, r"key 'model\.num_heads'"),
        ("model", {"hidden_size": -4}, r"key 'model\.hidden_size'"),
        ("model", {"image_sizes": [[0, 8]]}, r"key 'model\.image_sizes\.0\.0'"),
        ("optimizer", {"betas": [2.0, 0.5]}, r"key 'optimizer\.betas\.0'"),
        ("optimizer", {"learning_rate": float("inf")}, r"key 'optimizer\.learning_rate'"),
        ("sampling", {"num_inference_steps": 5000}, r"sampling\.num_inference_steps 5000 exceeds"),
        ("samples", {"every": 4}, r"samples\.every 4 is not a multiple of checkpoint\.every 3"),
    ],
)
def test_values_out_of_bounds_are_named(run_values, room, values, message):
    run_values[room] = run_values.get(room, {}) | values
    with pytest.raises(UserError, match=message) as refused:
        parsed(run_values)
    assert len(str(refused.value)) < 300


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
@pytest.mark.parametrize("backend", ["flex", "interval", "flash"])
def test_attention_that_cannot_train_here_is_refused_at_start(run_values, backend, monkeypatch):
    monkeypatch.setattr("interval_attention.api.INTERPRETED", False)
    run_values["model"]["attention"] = backend
    with pytest.raises(UserError, match=rf"model\.attention: {backend} is not supported .*use"):
        start(run_values)
    assert not Path(run_values["out"]).exists()


def test_a_seed_too_large_is_refused(run_values):
    with pytest.raises(UserError, match="key 'seed'"):
        parse_config(RunConfig, run_values | {"seed": 2**64}, "test")


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_compiling_without_a_compiler_is_refused_at_start(run_values, monkeypatch, tmp_path):
    run_values["train"]["compile"] = True
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError, match=r"train\.compile: true needs a C\+\+ compiler"):
        start(run_values)
    assert not Path(run_values["out"]).exists()


def test_samples_without_pairs_are_refused_at_start(run_values):
    del run_values["data"]["sources"]["pairs"]
    with pytest.raises(UserError, match=r"samples\.every 3: no source holds pairs, .*; set it to 0"):
        start(run_values | {"samples": {"every": 3}})
    assert not Path(run_values["out"], "config.yaml").exists()
