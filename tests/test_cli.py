"""The command line as a user meets it."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import click
import numpy as np
import pytest
import typer
import yaml
from PIL import Image
from typer.testing import CliRunner

from megafusion import TransfusionPipeline, __version__
from megafusion.cli import app, main
from megafusion.config import load_config
from megafusion.errors import UserError
from megafusion.images.reader import load_image
from megafusion.train.config import RunConfig
from tests.faults.job import Job
from tests.support.marks import full
from tests.support.raw import strange_images

ROOT = Path(__file__).parents[1]
COMMANDS = (
    *("train-tokenizer", "preprocess", "train-vae", "import", "train", "generate", "export"),
    *("report", "checkpoint", "launch", "keys", "serve"),
)


def run(*arguments: str) -> tuple[int, str]:
    """Exit status and error text of a command, in this process."""
    result = CliRunner().invoke(app, list(arguments))
    if isinstance(result.exception, UserError):
        return 2, str(result.exception)
    return result.exit_code, result.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_complete(command):
    status, text = run(command, "--help")
    assert status == 0
    assert "Example" in text
    for line in text.splitlines():
        if line.startswith("│ --") and "--help" not in line:
            assert len(line.strip("│ ").split("  ")) > 1, line


def commands(group: typer.core.TyperGroup, *names: str) -> Iterator[tuple[list[str], click.Command]]:
    """Every command with the words that call it."""
    for name, command in group.commands.items():
        if isinstance(command, typer.core.TyperGroup):
            yield from commands(command, *names, name)
        else:
            yield [*names, name], command


def test_no_help_loses_what_stands_in_brackets(monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    found = 0
    for names, command in commands(typer.main.get_command(app)):
        helps = [command.help, *(getattr(each, "help", None) for each in command.params)]
        words = [word.replace("\\[", "[") for text in helps for word in (text or "").split() if "[" in word]
        shown = run(*names, "--help")[1]
        assert all(word in shown for word in words), (names, words)
        found += len(words)
    assert found


def test_an_unknown_suite_is_refused_with_the_nearest():
    known = "perplexity, captions, images, reconstruction, geneval, lm; repeat it for several"
    status, text = run("evaluate", "no-run", "--suite", "captions", "--suite", "perplexty")
    assert (status, text) == (
        2,
        f"--suite: perplexty is unknown; did you mean perplexity? Name one of {known}",
    )
    assert run("evaluate", "no-run") == (2, f"--suite: name one of {known}")


@pytest.mark.parametrize("command", ["show", "verify", "export"])
def test_help_of_checkpoint_is_complete(command):
    status, text = run("checkpoint", command, "--help")
    assert status == 0
    assert "Example" in text


def test_help_of_train_says_how_to_start_on_many_devices():
    assert "--no_local_rank" in run("train", "--help")[1]


def test_top_level_help_names_every_command():
    status, text = run("--help")
    assert status == 0
    assert all(command in text for command in COMMANDS)


def test_a_user_error_is_one_message_and_status_2(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["megafusion", "train", "nowhere.yaml"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: nowhere.yaml: no such configuration file")


def redirect_stderr(folder: Path, rank: int) -> None:
    with (folder / f"stderr-{rank}").open("wb") as file:
        os.dup2(file.fileno(), 2)


@pytest.mark.parametrize("mistake", full("parallel.tensr=2", "parallel.tensor=3"))
def test_what_every_rank_refuses_is_shown_by_rank_0(tmp_path, mistake):
    values = yaml.safe_load((ROOT / "configs/quickstart.yaml").read_text()) | {"out": str(tmp_path / "run")}
    with Job(values, 2, mistake, inject=partial(redirect_stderr, tmp_path)) as job:
        first, second = job.processes
        first.join(120)
        # A launcher kills all others as soon as one has ended: the one with the message is the first.
        assert (first.exitcode, second.exitcode) == (2, None)
        second.join(60)
        assert second.exitcode == 2
    assert "error: " in (tmp_path / "stderr-0").read_text()
    assert "error: " not in (tmp_path / "stderr-1").read_text()


def test_the_installed_command_runs():
    done = subprocess.run(
        [sys.executable, "-m", "megafusion.cli", "--version"], capture_output=True, check=True
    )
    assert done.stdout.strip() == __version__.encode()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.num_stepz=5", r"unknown key 'train.num_stepz'; did you mean 'train.num_steps'\?"),
        (
            "data.sources.emoji.wieght=1",
            r"unknown key 'data.sources.emoji.wieght'; did you mean 'data.sources.emoji.weight'\?",
        ),
        ("zzz=1", r"unknown key 'zzz'; valid keys: checkpoint, data, model"),
        ("train.num_steps=many", r"key 'train.num_steps': Input should be a valid integer \(got 'many'\)"),
        ("train.num_steps=1.5", r"key 'train.num_steps'"),
        ("train.num_steps=0", r"key 'train.num_steps': Input should be greater than 0"),
        ("model.patch_size=3", r"key 'model.patch_size'"),
        ("objective.noise_process.prediction_type=x", r"key 'objective.noise_process.prediction_type'"),
        ("data.sequence_length=10", r"an image takes 20 positions, more than data.sequence_length 10"),
        ("telemetry.trackers=wandb", r"key 'telemetry.trackers' is a list: write \[wandb\]"),
        ("train.log_every=5", r"key 'train.log_every' was renamed: it is 'telemetry.log_every' now"),
        ("health.max_crashes=0", r"key 'health' was renamed: it is 'resilience' now"),
        ("nonsense", r"override 'nonsense' is not of the form key.path=value"),
    ],
)
def test_overrides_that_do_not_fit_are_named_with_the_way_out(override, message):
    with pytest.raises(UserError, match=message):
        load_config(RunConfig, ROOT / "configs/quickstart.yaml", [override])


def test_overrides_change_what_they_name():
    config = load_config(
        RunConfig, ROOT / "configs/quickstart.yaml", ["train.num_steps=50", "model.hidden_size=96", "seed=3"]
    )
    assert (config.train.num_steps, config.model.hidden_size, config.seed) == (50, 96, 3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [", "not readable as YAML"),
        ("- 1\n", "not readable as YAML keys"),
        ("seed: 1\n", "'out' is required"),
    ],
)
def test_configuration_files_that_are_none(tmp_path, content, message):
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        load_config(RunConfig, path)


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/**/*.yaml")), ids=lambda p: p.name)
def test_every_configuration_is_valid(path):
    from data_prep.config import PreprocessConfig
    from data_prep.tokenizer.config import TokenizerConfig
    from data_prep.vae.config import AutoencoderConfig
    from megafusion.sweep.config import load_sweep

    if "base" in yaml.safe_load(path.read_text()):
        assert load_sweep(path).base.is_file()
        return
    classes = {"preprocess": PreprocessConfig, "tokenizer": TokenizerConfig, "vae": AutoencoderConfig}
    load_config(classes.get(path.parent.name, RunConfig), path)


def test_train_and_generate_from_every_kind_of_folder(run_values, tmp_path):
    """train, then draw and describe from the run, its pipeline and a checkpoint."""
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(run_values))
    status, text = run("train", str(config), "train.num_steps=2", "checkpoint.every=1")
    assert status == 0, text
    folder = Path(run_values["out"])
    places = [folder, folder / "pipeline", folder / "checkpoints/step-00000002"]
    drawn = []
    for number, place in enumerate(places):
        out = tmp_path / f"out{number}"
        status, text = run(
            "generate", str(place), "--prompt", "red apple, 3d style", "--prompt", "x", "--out", str(out)
        )
        assert status == 0, text
        assert sorted(p.name for p in out.iterdir()) == [
            "0-red-apple-3d-style.png",
            "1-x.png",
            "captions.txt",
        ]
        drawn.append((out / "0-red-apple-3d-style.png").read_bytes())
    assert drawn[0] == drawn[1] == drawn[2]
    apple = str(tmp_path / "out0/0-red-apple-3d-style.png")
    status, text = run("generate", str(folder), "--image", apple, "--out", str(tmp_path / "said"))
    assert status == 0
    assert text.startswith(f"{apple}: ")
    mixed = ("--interleave", f"@{apple}", "--interleave", "and then")
    status, text = run(
        "generate",
        str(folder),
        *mixed,
        "--num-inference-steps",
        "2",
        "--sampler",
        "dpm++",
        "--out",
        str(tmp_path / "m"),
    )
    assert status == 0
    assert text.startswith("answer")


def test_generate_refuses_what_it_cannot_use(run_values, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not an image")
    for arguments, message in [
        ((), "nothing to generate"),
        (("--image", str(tmp_path / "none.png")), "none.png: no such image"),
        (("--image", str(broken)), "broken.png: not an image"),
        (("--prompt", "x"), "neither a pipeline folder, a run folder nor a checkpoint"),
    ]:
        out = tmp_path / "out"
        status, text = run("generate", str(tmp_path / "nowhere"), *arguments, "--out", str(out))
        assert status == 2
        assert message in text
        assert not out.exists()
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(run_values))
    assert run("train", str(config), "--stop-after", "1")[0] == 0
    status, text = run("generate", run_values["out"], "--prompt", "x", "--sampler", "heun")
    assert status == 2
    assert "sampler heun does not sample" in text
    status, text = run("generate", run_values["out"], "--prompt", "x", "--sampler", "eular")
    assert status == 2
    assert (
        "sampler: eular is unknown; did you mean 'euler' (kind ddpm)? The samplers are ddim, dpm++, euler,"
        in text
    )
    assert TransfusionPipeline.from_pretrained(run_values["out"]).sizes == [(32, 32)]


def test_strange_images_open_as_in_preprocessing(tmp_path):
    for content in strange_images().values():
        (tmp_path / "a.png").write_bytes(content)
        image = load_image(tmp_path / "a.png")
        assert (image.size, image.mode, image.info) == ((40, 40), "RGB", {})
    Image.fromarray(np.full((4, 4), -1, np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match=r"a\.tif: not an image that can be used \(image with values beyond"):
        load_image(tmp_path / "a.tif")


@pytest.mark.parametrize("command", ["train", "preprocess", "train-tokenizer", "train-vae"])
def test_every_key_is_listed_with_its_default_and_sentence(command):
    said = run("keys", command)[1].splitlines()
    assert len(said) >= 28
    keys, sentences = said[::2], said[1::2]
    assert all(": " in key for key in keys)
    assert all(sentence.startswith("    ") and sentence.endswith(".") for sentence in sentences)


def test_some_keys_are_listed_alone():
    said = run("keys", "train", "parallel.zero")[1]
    assert said.startswith("parallel.zero_stage: 1 of 0, 1, 2, 3\n    ")
    status, refused = run("keys", "train", "paralel.")
    assert status == 2
    assert "no key of train begins with 'paralel.'" in refused


@pytest.mark.parametrize("out", ["folder", "file/below", "file/deep/below", "n" * 300])
def test_a_path_where_no_file_can_be_is_refused_in_a_sentence(
    tmp_path, monkeypatch, capsys, shards, vae_folder, out
):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("old")
    arguments = [
        "data",
        "inspect",
        str(shards / "pairs"),
        "--vae",
        str(vae_folder),
        "--out",
        str(tmp_path / out),
    ]
    monkeypatch.setattr(sys, "argv", ["megafusion", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    *_, line = capsys.readouterr().err.strip().splitlines()
    assert re.fullmatch(rf"error: {tmp_path}/.*: .*; make room, or choose another path", line)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]
