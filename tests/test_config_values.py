"""Values that a configuration takes, refuses or warns of: paths, integers, unknown keys, no effect."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from data_prep.config import PreprocessConfig
from data_prep.vae.config import AutoencoderConfig
from megafusion.cli import app
from megafusion.config import Config, keys_of, load_config, parse_config
from megafusion.errors import UserError
from megafusion.launch.run_folder import run_folder
from megafusion.storage import expand_path
from megafusion.suggestions import ALIASES, suggest
from megafusion.train.config import RunConfig
from tests.support.small import ROOT

QUICKSTART = ROOT / "configs/quickstart.yaml"
HOME = {"HOME": "/home/someone", "SCRATCH": "/scratch/team", "USER": "someone"}


class Paths(Config):
    """Every way to hold a path."""

    one: Path
    """A path."""
    several: tuple[Path, ...] = ()
    """Paths."""
    perhaps: Path | None = None
    """A path or none."""


parts = st.lists(st.sampled_from(["runs", "a b", "ü", "~", "x~", "..", "d.e"]), min_size=1).map("/".join)


@given(parts, st.sampled_from(["~", "$HOME", "${HOME}", "$SCRATCH", "${SCRATCH}/$USER"]))
def test_paths_are_expanded_wherever_they_stand(tail, head):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in HOME.items():
            patch.setenv(name, value)
        start = head.replace("~", HOME["HOME"])
        for name, value in HOME.items():
            start = start.replace(f"${name}", value).replace(f"${{{name}}}", value)
        text, expected = f"{head}/{tail}", Path(f"{start}/{tail}")
        found = parse_config(Paths, {"one": text, "several": [text, "b"], "perhaps": text}, "test")
        assert (found.one, found.perhaps, found.several) == (expected, expected, (expected, Path("b")))
        assert parse_config(Paths, found.model_dump(mode="json"), "test") == found
        assert expand_path(tail if tail[0] != "~" else f"./{tail}").endswith(tail)  # only ~ at the start


@pytest.mark.parametrize("path", ["$NOT_SET_AT_ALL/x", "a/${NOT_SET_AT_ALL}", "~no-such-user/x"])
def test_a_path_that_cannot_be_expanded_is_refused(path):
    with pytest.raises(UserError, match=r"test: one: .* is not known here; write the path out"):
        parse_config(Paths, {"one": path}, "test")


def test_every_path_of_a_run_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    names = ("out", "data.tokenizer", "data.vae", "data.cache_dir", "data.sources.emoji.path")
    config = load_config(RunConfig, QUICKSTART, [f"{name}=~/x" for name in names])
    paths = (config.out, config.data.tokenizer, config.data.vae, config.data.cache_dir)
    assert {*map(str, paths), config.data.sources["emoji"].path} == {"/home/someone/x"}
    assert run_folder(QUICKSTART, ["out=~/x"]) == Path("/home/someone/x")
    url = load_config(RunConfig, QUICKSTART, ["data.sources.emoji.path=s3://a/~b$c"])
    assert url.data.sources["emoji"].path == "s3://a/~b$c"


def test_paths_of_commands_are_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run").mkdir()
    for arguments in (
        ("checkpoint", "show", "~/run"),
        ("status", "$HOME/run"),
        ("report", "~/run"),
        ("data", "verify", "~/run"),
        ("train", "~/run"),
        ("generate", "~/run", "--image=~/run"),
    ):
        error = CliRunner().invoke(app, list(arguments)).exception
        assert f"{tmp_path}/run" in str(error), arguments
    assert not Path("~").exists()


@pytest.mark.parametrize("cls", [RunConfig, PreprocessConfig, AutoencoderConfig])
def test_integers_out_of_range_are_refused_with_the_range(cls):
    integers = [path for path, annotation in annotations(cls) if annotation is int]
    assert len(integers) > 5
    for path in integers:
        for value in (2**63, -(2**64), 10**30):
            with pytest.raises(UserError) as refused:
                parse_config(cls, nested(path.replace("NAME", "a"), value), "test")
            (said,) = [line for line in str(refused.value).splitlines() if "required" not in line]
            assert path in said
            assert any(words in said for words in ("must be at most", "than", "must be"))


def annotations(cls: type[Config], parent: str = ""):
    """Dotted paths of the fields of a configuration, with their types."""
    for name, field in cls.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Config):
            yield from annotations(field.annotation, f"{parent}{name}.")
        else:
            yield f"{parent}{name}", field.annotation


def nested(path: str, value: object) -> dict:
    for part in reversed(path.split(".")):
        value = {part: value}
    return value


def test_a_seed_out_of_range_names_both_ends():
    message = r"key 'seed': it must be >= 0 and < 9223372036854775808 \(got 18446744073709551615\)$"
    with pytest.raises(UserError, match=message):
        load_config(RunConfig, QUICKSTART, ["seed=18446744073709551615"])


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("train.lr", "optimizer.learning_rate"),
        ("lr", "optimizer.learning_rate"),
        ("optimizer.LR", "optimizer.learning_rate"),
        ("train.learning_rate", "optimizer.learning_rate"),
        ("train.learning-rate", "optimizer.learning_rate"),
        ("data.learing_rate", "optimizer.learning_rate"),
        ("train.batch_size", "train.global_batch_size' or 'train.micro_batch_size"),
        ("bs", "train.global_batch_size' or 'train.micro_batch_size"),
        ("train.epochs", "train.num_steps"),
        ("max_steps", "train.num_steps"),
        ("train.wd", "optimizer.weight_decay"),
        ("warmup", "optimizer.num_warmup_steps"),
        ("train.warmup_steps", "optimizer.num_warmup_steps"),
        ("train.every", "checkpoint.every' or 'samples.every"),
        ("train.num_workers", "data.num_workers"),
        ("num_layers", "model.num_layers"),
        ("tokenizer", "data.tokenizer"),
        ("train.dataset", "data.sources"),
        ("optimiser.lr", "optimizer"),
        ("data.path", "data.sources.NAME.path"),
        ("output_dir", "out"),
    ],
)
def test_an_unknown_key_is_looked_for_in_every_section(typed, meant):
    with pytest.raises(UserError, match=rf"did you mean '{meant}'\?"):
        load_config(RunConfig, QUICKSTART, [f"{typed}=1"])


def test_aliases_lead_to_keys_of_some_command():
    keys = {key.path for cls in (RunConfig, PreprocessConfig, AutoencoderConfig) for key in keys_of(cls)}
    sections = {"data.sources"}
    for name, ends in ALIASES.items():
        for end in ends:
            assert any(f".{key}".endswith(f".{end}") for key in keys | sections), (name, end)


@pytest.mark.parametrize("cls", [RunConfig, PreprocessConfig, AutoencoderConfig])
@given(data=st.data())
def test_a_slip_of_a_letter_finds_the_key_from_any_section(cls, data):
    keys = sorted({key.path for key in keys_of(cls)})
    key = data.draw(st.sampled_from([key for key in keys if len(key.rpartition(".")[2]) > 6]))
    name = key.rpartition(".")[2]
    place = data.draw(st.integers(1, len(name) - 2))
    slip = name[:place] + name[place + 1 :]
    hint = suggest(f"elsewhere.{slip}", [], keys)
    assert name in hint or slip in {other.rpartition(".")[2] for other in keys} | ALIASES.keys()


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        (
            ["train.num_steps=20"],
            "optimizer.num_warmup_steps 60 is not below train.num_steps 20: the learning rate "
            "only rises, to 0.000667 at the last step",
        ),
        (
            ["optimizer.learning_rate=1e-6"],
            "optimizer.final_learning_rate .* is above optimizer.learning_rate 1e-06",
        ),
        (["checkpoint.every=300", "checkpoint.keep_every=500"], "steps that are a multiple of 1500 are kept"),
        (
            ["data.caption_dropout=0"],
            "caption_dropout 0 trains no image without its caption, so sampling.guidance",
        ),
        (["optimization.num_steps=100", "loss.adversarial_weight=0"], "warmup_steps 5000 is not below"),
        (["optimization.num_steps=9000", "loss.adversarial_weight=1"], "the adversarial term is never used"),
        (["optimization.num_steps=900000"], None),
        ([], None),
        (["data.caption_dropout=0", "sampling.guidance_scale=1"], None),
        (["optimizer.learning_rate=1e-6", "optimizer.schedule=constant"], None),
        (["train.num_steps=61"], None),
    ],
)
def test_values_that_cannot_do_what_they_say_are_warned_of(changes, warning):
    vae = any("optimization" in change for change in changes)
    cls, path = (AutoencoderConfig, ROOT / "configs/vae/paper.yaml") if vae else (RunConfig, QUICKSTART)
    said = load_config(cls, path, changes).warnings()
    assert len(said) == (warning is not None)
    if warning:
        assert re.match(f"warning: .*{warning}", said[0])
