"""Keys of the model that a configuration leaves out are taken from the data; messages give key and value."""

import json
import shutil
from itertools import combinations
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from megafusion.cli import app
from megafusion.config import parse_config
from megafusion.data.manifest import load_manifest
from megafusion.data.source import open_sources
from megafusion.errors import UserError
from megafusion.model.config import ModelConfig
from megafusion.train.config import RunConfig
from megafusion.train.from_data import load_training_config
from megafusion.train.loop import train
from tests.support.small import make_shards, small_run

KEYS = ModelConfig.keys_from_data


def write(path: Path, values: dict) -> Path:
    path.write_text(yaml.safe_dump(values))
    return path


def test_every_choice_of_keys_may_be_left_out(run_values, run_config, tmp_path):
    for number in range(len(KEYS) + 1):
        for missing in combinations(KEYS, number):
            model = {key: value for key, value in run_values["model"].items() if key not in missing}
            path = write(tmp_path / "run.yaml", run_values | {"model": model})
            assert load_training_config(path) == run_config
    path = write(tmp_path / "run.yaml", run_values | {"model": model})
    padded = load_training_config(path, ["model.vocab_size=2100"])  # what is given is kept
    assert (padded.model.vocab_size, padded.model.image_sizes) == (2100, ((32, 32),))
    with pytest.raises(UserError, match=r"key 'model.vocab_size' is required"):
        parse_config(RunConfig, run_values | {"model": model}, "run.yaml")


def without_keys(run_values: dict, **changes) -> dict:
    model = {key: value for key, value in run_values["model"].items() if key not in KEYS}
    return run_values | {"model": model, "data": run_values["data"] | changes}


def test_sizes_of_all_sources_are_taken_in_their_order(run_values, shards, tmp_path):
    """The first size has the token `boi`: its place matters."""
    shutil.copytree(shards / "pairs", tmp_path / "more")
    manifest = json.loads((tmp_path / "more/manifest.json").read_text())
    (tmp_path / "more/manifest.json").write_text(
        json.dumps(manifest | {"latent_shape": [4, 6, 10], "more_sizes": [[8, 8], [12, 4]]})
    )
    sources = {"text": run_values["data"]["sources"]["text"], "more": {"path": str(tmp_path / "more")}}
    sources |= run_values["data"]["sources"]
    found = load_training_config(write(tmp_path / "r.yaml", without_keys(run_values, sources=sources)))
    assert found.model.image_sizes == ((24, 40), (32, 32), (48, 16))
    assert found.model.vocab_size == 2048 + 2


def test_data_that_cannot_give_them_are_named(run_values, shards, tmp_path):
    only_text = {"text": run_values["data"]["sources"]["text"]}
    for changes, message in [
        ({"sources": {"pairs": {"path": str(tmp_path / "none")}}}, r"none: not a folder of shards"),
        ({"sources": only_text}, r"no source holds latents, whose sizes would be the image_sizes; give them"),
        ({"vae": str(tmp_path / "none")}, r"none: no config\.json there"),
        ({"tokenizer": str(tmp_path / "none.model")}, r"none\.model: no such tokenizer"),
    ]:
        path = write(tmp_path / "run.yaml", without_keys(run_values, **changes))
        names = ", ".join(f"model.{key}" for key in KEYS)
        with pytest.raises(
            UserError, match=rf"run\.yaml: without {names}, which the data cannot give: .*{message}"
        ):
            load_training_config(path)
    with pytest.raises(
        UserError, match=r"unknown key 'data.tokeniser'; did you mean 'data.tokenizer'"
    ) as raised:
        load_training_config(write(path, without_keys(run_values, tokeniser="x")))
    assert "vocab_size" not in str(raised.value)
    old = run_values | {"model": without_keys(run_values)["model"] | {"latent_shape": [4, 8, 8]}}
    with pytest.raises(
        UserError, match=r"key 'model.latent_shape' was renamed: it is 'model.latent_channels' and"
    ):
        load_training_config(write(path, old))


def test_keys_says_where_they_come_from():
    said = CliRunner().invoke(app, ["keys", "train", "model."]).stdout
    for key in KEYS:
        assert f"model.{key}: from the data\n" in said
    assert "model.patch_size: required" in said


def test_a_frozen_configuration_has_them(run_values, tmp_path):
    path = write(tmp_path / "run.yaml", without_keys(run_values))
    assert CliRunner().invoke(app, ["train", str(path), "train.num_steps=3"]).exit_code == 0
    frozen = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert {key: frozen["model"][key] for key in KEYS} == {key: run_values["model"][key] for key in KEYS}


def test_latents_far_from_unit_deviation_are_warned_of_at_the_start(vae_folder, tmp_path, capsys):
    vae = shutil.copytree(vae_folder, tmp_path / "vae")
    config = json.loads((vae / "config.json").read_text())
    (vae / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.05}))
    values = small_run(make_shards(tmp_path / "shards", vae), vae, tmp_path / "run")
    train(parse_config(RunConfig, values, "test"), stop_after=1)
    assert "warning: data.sources.pairs: normalized latents have mean" in capsys.readouterr().err


def test_shards_of_another_autoencoder_are_named_with_its_path(run_config, shards, tokenizer):
    made_with = yaml.safe_load(load_manifest(shards / "pairs").provenance["config"])["vae"]
    with pytest.raises(UserError, match=rf"or give the one that made the shards \(then {made_with}\)"):
        open_sources(run_config.data, tokenizer, "0" * 64, 0)
