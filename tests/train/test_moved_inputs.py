"""A resumed run knows its inputs by their hashes: moved ones are read, others are refused."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from megafusion.engine.process_group import start_process_group
from megafusion.errors import UserError
from megafusion.resilience.attempts import read_attempts
from megafusion.train.inputs import missing_inputs
from megafusion.train.open_model import open_checkpoint
from megafusion.train.run_folder import freeze
from tests.support.runs import parsed, start
from tests.support.small import TOKENIZER


@pytest.fixture
def inputs(run_values, shards, vae_folder, tmp_path) -> dict[str, Path]:
    """A run's inputs in places of their own, by the key that names them."""
    places = {f"data.sources.{name}.path": shards / name for name in ("pairs", "text")}
    places |= {"data.tokenizer": TOKENIZER, "data.vae": vae_folder}
    for key, original in places.items():
        place = tmp_path / "first" / key
        place.parent.mkdir(exist_ok=True)
        shutil.copytree(original, place) if original.is_dir() else shutil.copy(original, place)
        places[key] = place
    point_at(run_values, places)
    return places


def point_at(values: dict, places: dict[str, Path]) -> None:
    for key, place in places.items():
        *parents, name = key.split(".")
        section = values
        for parent in parents:
            section = section[parent]
        section[name] = str(place)


def test_moved_inputs_are_read_and_the_move_is_told_recorded_and_known_to_other_commands(
    run_values, inputs, tmp_path, capsys
):
    run = start(run_values, stop_after=2)
    (tmp_path / "first").rename(tmp_path / "second")
    moved = {key: tmp_path / "second" / key for key in inputs}
    point_at(run_values, moved)
    capsys.readouterr()
    start(run_values, stop_after=3)
    said = capsys.readouterr().err
    for key, place in moved.items():
        assert f"{run}: resumes with {key} {place} instead of {inputs[key]}\n" in said
    changed = {key: [str(inputs[key]), str(place)] for key, place in moved.items()}
    assert [attempt["changed"] for attempt in read_attempts(run)] == [{}, changed]
    assert open_checkpoint(run / "checkpoints/step-00000003", "ema").sizes == [(32, 32)]
    start(run_values, stop_after=4)
    assert "instead of" not in capsys.readouterr().err


def test_a_move_keeps_the_recipe_that_the_run_began_with(run_values, inputs, tmp_path):
    run = start(run_values, stop_after=1)
    (tmp_path / "first").rename(tmp_path / "second")
    point_at(run_values, {key: tmp_path / "second" / key for key in inputs})
    run_values["optimizer"]["learning_rate"] = 1e-3
    start(run_values, stop_after=2)
    frozen = yaml.safe_load((run / "config.yaml").read_text())
    assert frozen["optimizer"]["learning_rate"] == 3e-3
    assert frozen["data"]["tokenizer"] == str(tmp_path / "second/data.tokenizer")


def held_out_of(run: Path) -> tuple[int, str]:
    """Validation of a run's config.yaml: every how many steps, and where."""
    found = yaml.safe_load((run / "config.yaml").read_text())["data"]["validation"]
    return found["every"], found["sources"]["held-out"]["path"]


def test_held_out_shards_that_moved_are_known_to_other_commands(run_values, shards, tmp_path):
    """Where they are the same and nothing else of validation changes; it may change, being free."""
    start_process_group()
    first, second = tmp_path / "first", tmp_path / "second"
    shutil.copytree(shards / "pairs", first)
    validation = {"every": 3, "sources": {"held-out": {"path": str(first)}}}
    run_values["data"]["validation"] = validation
    config = parsed(run_values)
    freeze(config, "a", "b")
    assert held_out_of(config.out) == (3, str(first))
    first.rename(second)
    validation["sources"]["held-out"]["path"] = str(second)
    validation["every"] = 6
    freeze(parsed(run_values), "a", "b")
    assert held_out_of(config.out) == (3, str(first))
    validation["every"] = 3
    assert freeze(parsed(run_values), "a", "b") == {}
    assert held_out_of(config.out) == (3, str(second))
    validation["sources"]["held-out"]["path"] = str(shards / "text")
    freeze(parsed(run_values), "a", "b")
    assert held_out_of(config.out) == (3, str(second)), "other shards"
    record = config.out / "environment.json"
    known = json.loads(record.read_text())
    del known["held_out"]  # as of an earlier version
    record.write_text(json.dumps(known))
    freeze(parsed(run_values), "a", "b")
    assert held_out_of(config.out) == (3, str(second)), "it is still there, so this is no move"
    validation["sources"]["held-out"]["path"] = str(second.rename(tmp_path / "third"))
    freeze(parsed(run_values), "a", "b")
    assert held_out_of(config.out) == (3, str(tmp_path / "third"))


@pytest.mark.parametrize("which", ["tokenizer", "vae"])
@pytest.mark.parametrize("where", ["moved", "in place", "not recorded"])
def test_other_files_are_refused_wherever_they_are(run_values, which, where):
    start_process_group()
    config = parsed(run_values)
    hashes = {"tokenizer": "a" * 64, "vae": "b" * 64}
    freeze(config, **{f"{name}_hash": value for name, value in hashes.items()})
    if where == "not recorded":  # by an earlier version: then only the same place is known to be the same
        record = config.out / "environment.json"
        record.write_text(json.dumps({"shards": json.loads(record.read_text())["shards"]}))
        freeze(config, "c" * 64, "c" * 64)
    else:
        hashes[which] = "c" * 64
    if where != "in place":
        run_values["data"][which] = "elsewhere"
        config = parsed(run_values)
    before = (config.out / "config.yaml").read_text()
    with pytest.raises(UserError, match=rf"data\.{which}: other files than .* was started with"):
        freeze(config, **{f"{name}_hash": value for name, value in hashes.items()})
    assert (config.out / "config.yaml").read_text() == before


def test_a_vision_model_may_move_and_may_not_change(run_values, shards, tmp_path):
    start_process_group()
    place = tmp_path / "vision"
    place.mkdir()
    (place / "config.json").write_text("{}")
    (place / "model.safetensors").write_bytes(b"first")
    alignment = {"model": str(place), "feature_size": 4, "layer": 1}
    run_values["objective"] = {"alignment": alignment}
    config = parsed(run_values)
    assert freeze(config, "a", "b") == {}
    record = json.loads((config.out / "environment.json").read_text())
    alignment["model"] = str(place.rename(tmp_path / "moved"))
    key = "objective.alignment.model"
    assert freeze(parsed(run_values), "a", "b") == {key: [str(place), alignment["model"]]}
    assert freeze(parsed(run_values), "a", "b") == {}  # config.yaml has the new place
    (tmp_path / "moved/README.md").write_text("no part of the model")
    freeze(parsed(run_values), "a", "b")
    (tmp_path / "moved/model.safetensors").write_bytes(b"other")
    with pytest.raises(UserError, match=rf"{key}: other files than .* was started with"):
        freeze(parsed(run_values), "a", "b")
    del record["vision_model"]  # as of an earlier version
    (config.out / "environment.json").write_text(json.dumps(record))
    freeze(parsed(run_values), "a", "b")
    shutil.copytree(tmp_path / "moved", place)
    alignment["model"] = str(place)
    with pytest.raises(UserError, match=rf"{key}: other files than .* was started with"):
        freeze(parsed(run_values), "a", "b")
    alignment["model"] = str(tmp_path / "gone")
    assert list(missing_inputs(parsed(run_values))) == [f"{key} {tmp_path}/gone"]


def test_a_run_with_a_checkpoint_needs_what_it_began_from_no_more(run_values, tmp_path):
    run_values["train"]["init_from"] = str(tmp_path / "gone")
    assert list(missing_inputs(parsed(run_values))) == [f"train.init_from {tmp_path}/gone"]
    del run_values["train"]["init_from"]
    start(run_values, stop_after=1)
    run_values["train"]["init_from"] = str(tmp_path / "gone")
    assert list(missing_inputs(parsed(run_values))) == []


def test_another_source_or_another_order_is_another_recipe(run_values):
    start(run_values, stop_after=1)
    sources = run_values["data"]["sources"]
    run_values["data"]["sources"] = dict(reversed(sources.items()))
    with pytest.raises(UserError, match=r"other values of data\.sources \(see"):
        start(run_values)
    run_values["data"]["sources"] = sources
    run_values["data"]["sources"]["more"] = run_values["data"]["sources"]["text"]
    with pytest.raises(UserError, match=r"other values of data\.sources\.more"):
        start(run_values)
