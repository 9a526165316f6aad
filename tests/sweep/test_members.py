"""The runs of a sweep, and what is refused before one is started."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from megafusion.errors import UserError
from megafusion.sweep.config import load_sweep
from megafusion.sweep.members import Member, earlier_members, expand, left_nothing
from megafusion.sweep.results import recorded_runs, write_results
from tests.sweep.conftest import evaluate, train


def members(path: Path, *overrides: str) -> list[Member]:
    return expand(load_sweep(path, overrides), str(path))


def test_every_arm_is_trained_at_every_point_of_the_grid(sweep_file):
    changes = [
        "runs={plain: [train.num_steps=3], causal: {overrides: ['data.caption_dropout=0.{num_streams}']}}",
        "grid={seed: [0, 1], model: {small: {num_layers: 1}, wide: {hidden_size: 64}}}",
        "grid={data.num_streams: [4, 8]}",
        "evaluate={suites: [perplexity], options: {texts: ['held-out-{seed}.txt'], seed: 5}}",
        "runs.causal.evaluate=[batch_size=2]",
    ]
    found = members(sweep_file, *changes)
    assert len(found) == 16
    last = found[-1]
    assert last.name == "causal,seed=1,model=wide,num_streams=8"
    assert last.group == "causal,model=wide,num_streams=8"
    config = yaml.safe_load(last.config)
    assert config["out"] == str(last.out) == f"{last.out.parent}/{last.name}"
    assert (config["seed"], config["model"]["hidden_size"], config["model"]["num_layers"]) == (1, 64, 2)
    assert config["data"]["caption_dropout"] == 0.8
    assert last.evaluation.texts == (Path("held-out-1.txt"),)
    assert (last.evaluation.batch_size, found[0].evaluation.batch_size) == (2, 16)
    assert [member.num_steps for member in found] == [3] * 8 + [6] * 8
    assert len({member.out for member in found}) == 16


def test_a_sweep_without_arms_or_without_a_grid(sweep_file):
    values = yaml.safe_load(sweep_file.read_text())
    for changes, name in (({"runs": {}}, "seed=0"), ({"grid": {}, "runs": {"a": []}}, "a")):
        sweep_file.write_text(yaml.safe_dump(values | changes))
        assert [(each.name, each.group) for each in members(sweep_file)] == [
            (name, name.replace("seed=0", ""))
        ]
    sweep_file.write_text(yaml.safe_dump(values | {"runs": {}, "grid": {}}))
    with pytest.raises(UserError, match="neither runs nor grid"):
        members(sweep_file)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ("runs.bad=[model.hiden_size=3]", r"sweep\.yaml: runs\.bad \(bad,seed=0\): .*'model.hidden_size'"),
        ("runs.bad=[train.num_steps]", r"runs\.bad .*not of the form key.path=value"),
        ("runs.bad=[out=elsewhere]", r"runs\.bad .*override 'out': the sweep gives each run its folder"),
        ("runs.bad=[seed=3]", r"runs\.bad .*override 'seed' undoes grid\.seed; leave one of them out"),
        ("grid={model: {small: {num_layers: 3}}}", r"override 'model\.num_layers' undoes grid\.model;"),
        ("grid={model.num_layers: [3], model: {a: {num_layers: 4}}}", r"grid\.model.* undoes grid\.model"),
        ("runs.bad=['data.vae=v-{sed}']", r"\{sed\} stands for no key of the grid, which gives \{seed\}"),
        ("runs={../up: []}", r"runs: '\.\./up' cannot be a folder's name here"),
        ("runs={sweep.json: []}", "letters, digits and"),
        ("runs.bad={bass: 3}", r"unknown key 'runs\.bad\.bass'; did you mean 'runs\.bad\.base'"),
        ("runs.bad={evaluate: [seed=3]}", r"has an evaluate of its own, but the sweep has none"),
        ("runs.bad={base: no.yaml}", r"runs\.bad .*no\.yaml: no such configuration file"),
        ("grid.seed=[]", r"sweep\.yaml: grid\.seed is empty; give it a value, or leave it out"),
        ("grid.seed=[1, '1']", r"grid\.seed: 1 is there twice, and both runs would write one folder"),
        ("grid={data.vae: [a/b]}", r"grid\.data\.vae: a/b cannot be part of a folder's name"),
        ("grid.model=[{num_layers: 3}]", "cannot be part of a folder's name; write the values by name"),
        ("grid.sed=[0]", r"unknown key 'sed'; did you mean 'seed'\?"),
        ("evaluate={suites: []}", "evaluate.suites"),
        ("evaluate={suites: [nonsense]}", "evaluate.suites.0.*perplexity"),
        ("evaluate={suites: [perplexity], options: {text: []}}", "unknown key 'text'; did you mean 'texts'"),
        ("evaluate={suites: [perplexity]}", r"runs\.plain .*perplexity: give it texts=\[FILE\]"),
        (
            "evaluate={suites: [lm], options: {task_folder: ., sampling: {guidance_scal: 3}}}",
            "evaluate.options: sampling: unknown key 'guidance_scal'; did you mean 'guidance_scale'",
        ),
    ],
)
def test_bad_input_is_refused_with_the_run_and_the_key(sweep_file, change, fault):
    with pytest.raises(UserError, match=fault):
        members(sweep_file, change)
    assert not (sweep_file.parent / "sweep").exists()


def test_an_override_of_a_mapping_that_undoes_a_value_of_the_grid_is_refused(sweep_file):
    with pytest.raises(UserError, match=r"override 'train' undoes grid\.train\.num_steps; leave one"):
        members(sweep_file, "grid={train.num_steps: [3]}", "runs.bad=['train={num_steps: 4}']")


def test_an_unparsable_base_is_refused(sweep_file):
    (sweep_file.parent / "config.yaml").write_text("data: [")
    with pytest.raises(UserError, match=r"runs\.plain .*config\.yaml: not readable as YAML: .* in line 1"):
        members(sweep_file)


def test_inputs_that_are_not_there_are_named(sweep_file):
    changes = [
        "runs.plain=[data.vae=no/vae]",
        "evaluate={suites: [captions], options: {annotations: no.json}}",
    ]
    first = members(sweep_file, *changes)[0]
    assert first.missing == ("data.vae no/vae", "evaluate.options.annotations no.json")


def test_a_value_beside_those_of_the_grid_undoes_none(sweep_file):
    values = "grid={seed: [0], model: {small: {hidden_size: 64}}, train.num_steps: [3]}"
    found = members(sweep_file, values, "runs={a: ['train={global_batch_size: 2}', model.num_layers=1]}")
    config = yaml.safe_load(found[-1].config)
    assert (config["model"]["hidden_size"], config["model"]["num_layers"]) == (64, 1)
    assert (config["train"]["num_steps"], config["train"]["global_batch_size"]) == (3, 2)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ("optimizer.learning_rate=0.125", r"optimizer\.learning_rate 0\.003 instead of 0\.125"),
        ("sampling.num_inference_steps=5", r"sampling\.num_inference_steps 4 instead of 5"),
        ("model.attention=flex", r"model\.attention sdpa instead of flex"),
        ("train.num_steps=5", r"train\.num_steps 6 instead of 5"),
        ("train.freeze=['head']", r"train\.freeze"),
        ("data.sources.pairs.path=OTHER", r"data\.sources\.pairs\.path .*/pairs instead of .*OTHER"),
        ("data.validation={every: 3, sources: {a: {path: OTHER}}}", r"data\.validation None instead of"),
    ],
)
def test_an_edited_sweep_does_not_take_the_figures_of_the_run_before(sweep_file, change, fault):
    train(members(sweep_file)[0])
    with pytest.raises(UserError, match=fault) as refused:
        members(sweep_file, f"runs.plain=[{change!r}]")
    assert str(refused.value).startswith(f"{sweep_file}: runs.plain (plain,seed=0): ")


def test_what_changes_no_figure_may_change_and_a_run_may_become_longer(sweep_file):
    train(members(sweep_file)[0])
    same = members(sweep_file, "runs.plain=[telemetry.log_every=3, checkpoint.every=2]")[0]
    assert same.is_trained
    assert not members(sweep_file, "runs.plain=[train.num_steps=9]")[0].is_trained
    config = same.out / "config.yaml"
    gone = config.read_text().replace("/pairs", "/gone")
    config.write_text(gone)
    assert members(sweep_file)[0].is_trained, "its shards have moved"


def test_a_run_that_became_longer_has_no_figures_of_the_shorter_one(sweep_file):
    train(members(sweep_file)[0], 6, 9)
    with pytest.raises(UserError, match=r"has trained 9 steps, more than train\.num_steps 6; choose another"):
        members(sweep_file)


def test_an_evaluation_is_known_by_its_suites_and_options(sweep_file):
    values = "evaluate={suites: [perplexity], options: {texts: [a.txt], max_items: 2, task_folder: configs}}"
    first = members(sweep_file, values)[0]
    evaluate(first, 2.0)
    assert first.is_evaluated
    assert members(sweep_file, values)[0].results == first.results
    for change in ("evaluate.options.max_items=1", "evaluate.suites=[perplexity, lm]"):
        other = members(sweep_file, values, change)[0]
        assert not other.is_evaluated
        assert other.results.parent == first.results.parent


def test_an_evaluation_is_known_by_what_its_files_contain(sweep_file, tmp_path):
    """Not by where they lie, nor by an image folder that no annotations name images of."""
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("water\n")
    (tmp_path / "judge").mkdir()
    (tmp_path / "judge/model.safetensors").write_bytes(b"1")

    def results(text: str, **options: str) -> str:
        options = {"texts": [str(tmp_path / text)], "clip": str(tmp_path / "judge")} | options
        evaluation = {"suites": ["perplexity"], "options": options}
        return members(sweep_file, f"evaluate={json.dumps(evaluation)}")[0].results.name

    first = results("a.txt")
    assert results("b.txt") == results("b.txt", image_folder="elsewhere") == first
    assert results("b.txt", inception=str(tmp_path / "a.txt")) != first, "another key has the content"
    assert results("gone.txt") != first
    (tmp_path / "b.txt").write_text("ice\n")
    assert results("b.txt") != first
    (tmp_path / "judge/model.safetensors").write_bytes(b"other")
    assert results("a.txt") != first


def test_an_evaluation_is_known_by_its_images_and_its_detector(sweep_file, tmp_path):
    """Of the images those that the annotations name, wherever they lie."""
    named = {"images": [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "deep/b.png"}]}
    for place in ("here", "there"):
        (tmp_path / place / "deep").mkdir(parents=True)
        (tmp_path / place / "captions.json").write_text(json.dumps(named))
        for name in ("a.png", "deep/b.png"):
            (tmp_path / place / name).write_bytes(b"same")
    (tmp_path / "detector").mkdir()
    (tmp_path / "detector/config.json").write_text("{}")

    def results(**options: str) -> str:
        options = {"annotations": str(tmp_path / "here/captions.json")} | options
        evaluation = {"suites": ["captions"], "options": options}
        return members(sweep_file, f"evaluate={json.dumps(evaluation)}")[0].results.name

    first = results()
    assert results(annotations=str(tmp_path / "there/captions.json")) == first
    assert results(image_folder=str(tmp_path / "there")) == first
    (tmp_path / "there/other.png").write_bytes(b"not named")
    assert results(image_folder=str(tmp_path / "there")) == first
    (tmp_path / "there/deep/b.png").write_bytes(b"else")
    assert results(image_folder=str(tmp_path / "there")) != first
    folder = results(detector=str(tmp_path / "detector"))
    (tmp_path / "detector").rename(tmp_path / "moved")
    assert results(detector=str(tmp_path / "moved")) == folder
    (tmp_path / "moved/config.json").write_text("{ }")
    assert results(detector=str(tmp_path / "moved")) != folder
    assert results(detector="mine:detect") != results(detector="mine:other")
    (tmp_path / "here/captions.json").write_text("[")
    with pytest.raises(UserError, match=r"captions\.json: cannot be read as JSON"):
        results()


def test_a_detector_that_is_not_there_is_named(sweep_file):
    change = "evaluate={suites: [geneval], options: {prompts: sweep.yaml, detector: no/detr}}"
    assert "evaluate.options.detector no/detr" in members(sweep_file, change)[0].missing
    change = "evaluate={suites: [geneval], options: {prompts: sweep.yaml, detector: 'module:function'}}"
    assert members(sweep_file, change)[0].missing == ("evaluate.options.prompts sweep.yaml",)


def grown(path: Path, *overrides: str) -> tuple[list[Member], list[Member]]:
    """The runs of a sweep, and those that its folder has from earlier calls."""
    sweep = load_sweep(path, overrides)
    found = expand(sweep, str(path))
    return found, earlier_members(sweep, str(path), recorded_runs(sweep.out), found)


@pytest.mark.parametrize(
    "more",
    [
        "{}",
        "{train.ema_decay: [0.5, 1.0e-3]}",
        "{model: {wide: {hidden_size: 64}}}",
        "{data.vae: [vae]}",
        "{data.vae: ['7']}",
        "{model.head_dim: [null]}",
    ],
)
def test_runs_of_other_values_of_the_grid_stay_in_the_results(sweep_file, more):
    """With the configuration that they had; an earlier run that was not begun is forgotten."""
    made, _ = grown(sweep_file, f"grid={more}", "grid.seed=[0, 1]")
    for member in made[1:]:
        train(member, text_loss=1.0)
    out = made[0].out.parent
    write_results(out, made, {})
    asked, found = grown(sweep_file, f"grid={more}", "grid.seed=[2]")
    assert [(each.name, each.config) for each in found] == [(each.name, each.config) for each in made[1:]]
    assert len(asked) == len(made) / 2
    forgotten = left_nothing(
        load_sweep(sweep_file, [f"grid={more}", "grid.seed=[2]"]), recorded_runs(out), asked
    )
    assert list(forgotten) == [made[0].name]
    results = write_results(out, asked, {}, found, forgotten)
    assert [group["text_loss"]["runs"] for group in results["groups"].values()].count(2) == len(asked) - 1
    assert recorded_runs(out).keys() == {each.name for each in (*asked, *made[1:])}


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (
            "runs.plain=[optimizer.learning_rate=0.125]",
            r"plain,seed=0.*learning_rate 0\.003 instead of 0\.125",
        ),
        ("grid={data.num_streams: [4]}", r"holds results of plain,seed=0, no run of this sweep"),
        (
            "grid={seed: {one: 1}}",
            r"plain,seed=0, of a value that grid\.seed does not have; choose another out",
        ),
    ],
)
def test_runs_that_the_sweep_cannot_have_made_are_refused(sweep_file, change, fault):
    made, _ = grown(sweep_file)
    train(made[0])
    write_results(made[0].out.parent, made, {})
    changes = [change] if "grid" in change else [change, "grid.seed=[1]"]
    with pytest.raises(UserError, match=fault) as refused:
        grown(sweep_file, *changes)
    assert str(made[0].out.parent / "sweep.json") in str(refused.value)
    shutil.rmtree(made[0].out)
    assert grown(sweep_file, *changes)[1] == [], "a folder that is gone has no results"


def test_an_arm_that_the_sweep_has_no_more_is_refused(sweep_file):
    made, _ = grown(sweep_file)
    train(made[1])
    write_results(made[0].out.parent, made, {})
    values = yaml.safe_load(sweep_file.read_text())
    del values["runs"]["causal"]
    sweep_file.write_text(yaml.safe_dump(values))
    with pytest.raises(
        UserError,
        match=r"holds results of causal,seed=0, no run .*or remove .*causal,seed=0 and its entry there$",
    ):
        grown(sweep_file)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ('{"runs": []}', "has no mapping of runs"),
        ("[]", "is not a JSON object"),
        ('{"runs": {"plain,seed=0": {"arm": "plain"}}}', r"runs\.plain,seed=0 is not a run of a sweep"),
        ('{"runs": {"plain,seed=0": 3}}', r"runs\.plain,seed=0 is not a run of a sweep"),
    ],
)
def test_a_malformed_record_is_refused_with_its_path(sweep_file, text, fault):
    path = sweep_file.parent / "sweep/sweep.json"
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(UserError, match=rf"sweep/sweep\.json: {fault}.*; restore it, or remove it"):
        grown(sweep_file)
