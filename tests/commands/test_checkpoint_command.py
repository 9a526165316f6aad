"""`megafusion checkpoint`: its output, its refusals, and the pipelines that it exports."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from megafusion import TransfusionPipeline
from megafusion.cli import app
from megafusion.config import parse_config
from megafusion.errors import UserError
from megafusion.train.config import RunConfig
from megafusion.train.loop import train
from tests.support.checkpoints import load_full_tensors


def checkpoint(*arguments: object) -> str:
    """The output of a `megafusion checkpoint ...` command."""
    done = CliRunner().invoke(app, ["checkpoint", *map(str, arguments)])
    if done.exception is not None:
        raise done.exception
    return done.stdout


@pytest.fixture
def run(run_values) -> Path:
    config = parse_config(RunConfig, run_values, "test")
    train(config)
    return config.out


def test_show_lists_a_run_and_describes_a_checkpoint(run):
    (run / "checkpoints/step-00000009").mkdir()
    lines = [line.split() for line in checkpoint("show", run).splitlines()]
    assert lines[0] == ["step", "bytes", "complete", "saved", "by"]
    sizes = [
        sum(file["bytes"] for file in json.loads((c / "manifest.json").read_text())["files"].values())
        for c in sorted((run / "checkpoints").glob("step-*[36]"))
    ]
    assert [(row[0], row[1].replace(",", ""), row[2]) for row in lines[1:3]] == [
        ("3", str(sizes[0]), "yes"),
        ("6", str(sizes[1]), "yes"),
    ]
    assert " ".join(lines[1][3:]) == "world_size 1, zero_stage 1"
    assert lines[3] == ["9", "no"]
    pipeline = TransfusionPipeline.from_pretrained(run / "pipeline")
    num_parameters = sum(p.numel() for p in pipeline.model.parameters())
    text = checkpoint("show", run / "checkpoints/step-00000006")
    for kind in ("model", "ema", "exp_avg", "exp_avg_sq"):
        (line,) = (line.split() for line in text.splitlines() if line.split()[0] == kind)
        assert line[1:] == [f"{num_parameters:,}", "parameters", f"{4 * num_parameters:,}", "bytes"]
    assert "world_size 1" in text


def test_show_reports_a_checkpoint_with_a_truncated_file(run):
    with (run / "checkpoints/step-00000003/tensors/__0_0.distcp").open("r+b") as file:
        file.truncate(1000)
    assert [line.split()[2] for line in checkpoint("show", run).splitlines()[1:]] == ["damaged", "yes"]


def test_verify_names_the_bad_file(run):
    assert checkpoint("verify", run).count("files intact") == 2
    file = run / "checkpoints/step-00000003/tensors/__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    checkpoint("verify", run / "checkpoints/step-00000006")
    for path in (run, file.parents[1]):
        with pytest.raises(UserError, match=r"step-00000003/tensors/__0_0\.distcp: damaged"):
            checkpoint("verify", path)
    (run / "checkpoints/step-00000006/state.json").write_text("{}")
    with pytest.raises(UserError, match=r"(?s)step-00000003/tensors.*step-00000006/state\.json"):
        checkpoint("verify", run)


def test_export_is_the_published_model_or_the_raw_weights(run, tmp_path):
    last = run / "checkpoints/step-00000006"
    assert str(tmp_path / "average") in checkpoint("export", last, tmp_path / "average")
    published, average = (
        load_file(f / "model.safetensors") for f in (run / "pipeline", tmp_path / "average")
    )
    assert published.keys() == average.keys()
    assert all(torch.equal(published[name], average[name]) for name in published)
    checkpoint("export", last, tmp_path / "raw", "--weights")
    raw = load_file(tmp_path / "raw/model.safetensors")
    stored = load_full_tensors(last, {name: tensor.shape for name, tensor in raw.items()}, "model")
    assert all(torch.equal(raw[name], stored[name]) for name in raw)
    assert any(not torch.equal(raw[name], average[name]) for name in raw)
    with pytest.raises(UserError, match=r"raw: exists; .* --overwrite"):
        checkpoint("export", last, tmp_path / "raw")
    checkpoint("export", run, tmp_path / "newest")
    checkpoint("export", run, tmp_path / "newest", "--overwrite")
    newest = load_file(tmp_path / "newest/model.safetensors")
    assert all(torch.equal(newest[name], average[name]) for name in average)
    pipeline = TransfusionPipeline.from_pretrained(tmp_path / "raw")
    assert pipeline.draw(["red apple"])[0].size == (32, 32)


def test_a_path_without_checkpoints_is_named(tmp_path, run_values):
    config = parse_config(RunConfig, run_values, "test")
    for command in ("show", "verify"):
        with pytest.raises(UserError, match="neither a run folder nor a checkpoint"):
            checkpoint(command, tmp_path / "nowhere")
    with pytest.raises(UserError, match="neither a run folder nor a checkpoint"):
        checkpoint("export", config.out, tmp_path / "out")
    (config.out / "checkpoints").mkdir(parents=True)
    (config.out / "config.yaml").write_text("")
    with pytest.raises(UserError, match="no checkpoint yet; train it further"):
        checkpoint("show", config.out)
    half = config.out / "checkpoints/step-00000003"
    half.mkdir()
    with pytest.raises(UserError, match=r"no manifest\.json, so the checkpoint is incomplete"):
        checkpoint("verify", config.out)
    assert not (tmp_path / "out").exists()
