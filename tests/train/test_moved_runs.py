"""Runs and their checkpoints open from any working directory, and after they were moved."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from megafusion import TransfusionPipeline
from megafusion.cli import app
from megafusion.errors import UserError
from megafusion.train.run_folder import changed_recipe, load_run_config
from tests.support.small import TOKENIZER

CHECKPOINT = "checkpoints/step-00000001"
RELATIVE = {"out": "runs/small", "tokenizer": "assets/tokenizer.model", "vae": "assets/vae"}


@pytest.fixture
def project(run_values, shards, vae_folder, tmp_path, monkeypatch) -> Path:
    """A folder with everything that a run reads, named by relative paths; the working directory."""
    project = tmp_path / "project"
    shutil.copytree(shards, project / "shards")
    shutil.copytree(vae_folder, project / "assets/vae")
    shutil.copyfile(TOKENIZER, project / "assets/tokenizer.model")
    run_values["out"] = RELATIVE["out"]
    run_values["data"] |= {key: RELATIVE[key] for key in ("tokenizer", "vae")}
    for name, source in run_values["data"]["sources"].items():
        source["path"] = f"shards/{name}"
    (project / "run.yaml").write_text(yaml.safe_dump(run_values))
    monkeypatch.chdir(project)
    train()
    return project


def train(config: str = "run.yaml", *overrides: str) -> None:
    values = "train.num_steps=2", "checkpoint.every=1", "samples.every=0", *overrides
    done = CliRunner().invoke(app, ["train", config, *values], catch_exceptions=False)
    assert done.exit_code == 0


def drawn(path: Path | str) -> np.ndarray:
    return np.asarray(TransfusionPipeline.from_pretrained(path).draw(["red apple"])[0])


def freeze_as_before(run: Path) -> None:
    """The frozen configuration as earlier versions wrote it: paths as they were given."""
    values = yaml.safe_load((run / "config.yaml").read_text())
    values["out"] = RELATIVE["out"]
    values["data"] |= {key: RELATIVE[key] for key in ("tokenizer", "vae")}
    for name, source in values["data"]["sources"].items():
        source["path"] = f"shards/{name}"
    (run / "config.yaml").write_text(yaml.safe_dump(values))


@pytest.mark.parametrize("is_earlier", [False, True])
def test_a_run_opens_from_any_directory_and_when_its_project_was_moved(
    project, tmp_path, monkeypatch, is_earlier
):
    run = project / "runs/small"
    expected = drawn(run / "pipeline")
    if is_earlier:
        freeze_as_before(run)
    shutil.move(run / "pipeline", run / "published")  # so that the run's checkpoint is opened
    monkeypatch.chdir("/")
    assert np.array_equal(drawn(run / "checkpoints/step-00000002"), expected)
    for directory, name in (
        (run.parent, "small"),
        (run, "."),
        (run / "checkpoints", "step-00000002"),
        (run / CHECKPOINT, "../step-00000002"),
    ):
        monkeypatch.chdir(directory)
        assert np.array_equal(drawn(name), expected), name
        exported = tmp_path / "exported"
        command = ["checkpoint", "export", str(name), str(exported), "--overwrite"]
        assert CliRunner().invoke(app, command, catch_exceptions=False).exit_code == 0
        assert np.array_equal(drawn(exported), expected), name
    monkeypatch.chdir("/")
    moved = tmp_path / "elsewhere"
    shutil.move(project, moved)
    run = moved / "runs/small"
    assert np.array_equal(drawn(run), expected)
    config = load_run_config(run)
    assert config.out == run
    assert config.data.sources["pairs"].path == str(moved / "shards/pairs")
    monkeypatch.chdir(moved)
    train()  # and resumes: nothing is left to do


def test_a_run_that_was_moved_alone_finds_its_files(project, tmp_path, monkeypatch):
    expected = drawn("runs/small/checkpoints/step-00000002")
    shutil.move("runs/small", tmp_path / "alone")
    monkeypatch.chdir("/")
    assert np.array_equal(drawn(tmp_path / "alone/checkpoints/step-00000002"), expected)


def test_the_same_command_resumes_without_a_changed_path(project):
    from megafusion.config import load_config
    from megafusion.train.config import RunConfig

    config = load_config(RunConfig, "run.yaml", ["train.num_steps=2", "checkpoint.every=1"])
    assert changed_recipe(config) == {}
    freeze_as_before(Path("runs/small"))
    assert changed_recipe(config) == {}


def test_every_kind_of_folder_opens_by_the_same_call(project):
    """Pipeline, run, checkpoint and an older checkpoint; other folders are refused."""
    run = Path("runs/small")
    images = [drawn(str(path)) for path in (run, run / "pipeline", run / "checkpoints/step-00000002")]
    assert np.array_equal(images[0], images[1])
    assert np.array_equal(images[0], images[2])
    assert not np.array_equal(drawn(run / CHECKPOINT), images[0])
    assert TransfusionPipeline.from_pretrained(run / CHECKPOINT).config.sequence_length == 96
    for other in ("shards", "nowhere", run / "checkpoints"):
        with pytest.raises(UserError, match="neither a pipeline folder, a run folder nor a checkpoint"):
            TransfusionPipeline.from_pretrained(other)
