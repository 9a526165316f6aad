"""`megafusion generate`: its outputs, and what it refuses."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from megafusion.cli import app
from megafusion.errors import UserError
from megafusion.generate.pipeline import TransfusionPipeline
from tests.support.generation import make_pipeline


@pytest.fixture
def folder(run_config, tokenizer, codec, tmp_path) -> Path:
    make_pipeline(run_config, tokenizer, codec, num_steps=1).save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


def generate(folder: Path, *arguments: str) -> str:
    done = CliRunner().invoke(app, ["generate", str(folder), *map(str, arguments)])
    if isinstance(done.exception, UserError):
        raise done.exception
    return done.output


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    "again",
    [
        ("--prompt", "x"),  # the same image
        ("--prompt", "pizza"),  # captions.txt alone
        ("--image", "IMAGE"),
        ("--interleave", "x"),
    ],
)
def test_outputs_of_an_earlier_call_are_kept_unless_told(folder, tmp_path, again):
    out = tmp_path / "out"
    generate(folder, "--prompt", "x", "--out", out)
    before = contents(out)
    again = [str(out / "0-x.png") if part == "IMAGE" else part for part in again]
    with pytest.raises(UserError, match=r"of an earlier call; choose another --out, or add --overwrite"):
        generate(folder, *again, "--seed", 1, "--out", out)
    assert contents(out) == before
    generate(folder, *again, "--seed", 1, "--out", out, "--overwrite")
    assert contents(out) != before


def test_every_call_without_a_folder_has_one_of_its_own(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        generate(folder, "--prompt", "x")
    assert contents(tmp_path / "generated-1").keys() == contents(tmp_path / "generated-2").keys()


def test_an_image_that_would_be_lost_is_named(folder, tmp_path):
    """Also where no captions.txt is beside it, as the user's own."""
    out = tmp_path / "out"
    out.mkdir()
    Image.new("RGB", (4, 4)).save(out / "0-x.png")
    Image.new("RGB", (4, 4)).save(out / "answer-3.png")
    for arguments, name in ((("--prompt", "x"), "0-x.png"), (("--interleave", "x"), "answer-3.png")):
        with pytest.raises(UserError, match=name):
            generate(folder, *arguments, "--out", out)
    generate(folder, "--prompt", "other", "--out", out)
    assert Image.open(out / "0-x.png").size == (4, 4)


def test_no_folder_is_made_where_nothing_is_drawn(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    before = sorted(tmp_path.iterdir())
    assert generate(folder, "--image", "a.png").startswith("a.png: ")
    assert generate(
        folder, "--interleave", "x", "--begin", "text", "--option", "max_new_tokens=0"
    ).startswith("answer: nothing")
    assert sorted(tmp_path.iterdir()) == before
    generate(folder, "--image", "a.png", "--out", "out")
    assert contents(tmp_path / "out").keys() == {"captions.txt"}


def test_images_are_edited_as_an_instruction_tells(folder, tmp_path):
    pipeline = TransfusionPipeline.from_pretrained(folder)
    images = [Image.new("RGB", (32, 32), color) for color in ("red", "blue")]
    paths = [tmp_path / name for name in ("a b.png", "c.png")]
    for image, path in zip(images, paths, strict=True):
        image.save(path)
    out = tmp_path / "out"
    given = (
        "--image",
        paths[0],
        "--image",
        paths[1],
        "--edit",
        "make it blue",
        "--seed",
        5,
        "--size",
        "32x32",
    )
    said = generate(folder, *given, "--out", out)
    assert f"{out}/edit-0-a-b.png: drawn from {paths[0]}, edited: 'make it blue'\n" in said
    assert contents(out).keys() == {"captions.txt", "edit-0-a-b.png", "edit-1-c.png"}
    for number, name in enumerate(("edit-0-a-b.png", "edit-1-c.png")):
        expected = pipeline.edit(images[number], "make it blue", seed=5 + number)
        assert np.array_equal(np.asarray(Image.open(out / name)), np.asarray(expected))
    with pytest.raises(UserError, match=r"edit-0-a-b\.png: of an earlier call|captions\.txt: of an earlier"):
        generate(folder, *given, "--out", out)
    for arguments in (("--edit", "x"), ("--image", paths[0], "--edit", " ")):
        with pytest.raises(UserError, match=r"--edit: give an --image to change|nothing to generate"):
            generate(folder, *arguments, "--out", tmp_path / "none")


def test_an_answer_begins_as_told(folder, tmp_path):
    out = tmp_path / "out"
    assert "answer-0.png" in generate(folder, "--interleave", "x", "--begin", "image", "--out", out)
    (expected,) = TransfusionPipeline.from_pretrained(folder).generate([["x"]], begin="image")
    assert np.array_equal(np.asarray(Image.open(out / "answer-0.png")), np.asarray(expected[0]))
    with pytest.raises(UserError, match="--begin is for the answer to --interleave"):
        generate(folder, "--prompt", "x", "--begin", "image")


def test_a_refusal_is_all_that_is_printed(folder, tmp_path):
    """Also where it comes after the model is loaded: no empty line of a progress bar."""
    for options in (("--seed", "-1"), ("--num-inference-steps", "5000")):
        done = CliRunner().invoke(app, ["generate", str(folder), "--prompt", "x", *options])
        assert isinstance(done.exception, UserError)
        assert done.output == ""


def test_wrong_options_are_refused_before_the_model_is_opened(tmp_path):
    for options, message in (
        (("--option", "temprature=1"), r"^generate: unknown key 'temprature'"),
        (("--sampler", "PNDM"), r"^generate: sampler: PNDM draws worse or is for other models"),
        (("--num-inference-steps", "2000000"), r"^generate: key 'num_inference_steps': it must be"),
    ):
        with pytest.raises(UserError, match=message):
            generate(tmp_path / "none", "--prompt", "x", *options)
    with pytest.raises(UserError, match=r"nothing to generate: give --prompt, --prompts, --image or"):
        generate(tmp_path / "none")


@pytest.mark.parametrize("prompt", ["", " \t", "\u200b"])
def test_a_blank_prompt_is_refused(folder, tmp_path, prompt):
    with pytest.raises(UserError, match=r"--prompt: is empty or blank"):
        generate(folder, "--prompt", "x", "--prompt", prompt, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_is_written_where_a_later_prompt_is_refused(folder, tmp_path):
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"sequence_length": null', '"sequence_length": 60'))
    with pytest.raises(UserError, match=r"trained on sequences of 60; shorten it"):
        generate(folder, "--prompt", "x", "--interleave", "apple " * 60, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_text_of_an_interleaved_prompt_may_begin_with_an_at_sign(folder, tmp_path, monkeypatch):
    asked = []

    def call(_pipeline, prompts, **_options):
        asked.extend(prompts)
        return [[] for _ in prompts]

    monkeypatch.setattr(TransfusionPipeline, "generate", call)
    Image.new("RGB", (4, 4)).save(tmp_path / "@a.png")
    parts = ["@@home", "@@@b", f"@{tmp_path}/@a.png", "a@b"]
    generate(folder, *(each for part in parts for each in ("--interleave", part)), "--out", tmp_path / "out")
    ((first, second, image, last),) = asked
    assert (first, second, last) == ("@home", "@@b", "a@b")
    assert image.size == (4, 4)


@pytest.mark.parametrize("seed", [2**64 - 1, 2**63, -1])
def test_a_seed_out_of_range_is_refused_with_the_range(folder, tmp_path, seed):
    arguments = "--prompt", "x", "--prompt", "y", "--out", tmp_path / "out"
    with pytest.raises(UserError, match=rf"^seed={seed}: give an integer from 0 to {2**63 - 1}$"):
        generate(folder, *arguments, "--seed", seed)
    assert not (tmp_path / "out").exists()
    generate(folder, *arguments, "--seed", 2**63 - 1)


def test_prompts_of_a_file_are_drawn_as_if_given_one_by_one(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("megafusion.commands.generate.BATCH_SIZE", 2)
    path = tmp_path / "prompts.txt"
    path.write_text("red apple\n\npizza, 3d style\r\n  \n\u200b\ncat\n", "utf-8")
    given = ("--prompt", "red apple", "--prompt", "pizza, 3d style", "--prompt", "cat", "--seed", 3)
    generate(folder, *given, "--out", tmp_path / "given")
    generate(folder, "--prompts", path, "--seed", 3, "--out", tmp_path / "read")
    found, expected = contents(tmp_path / "read"), contents(tmp_path / "given")
    assert found.keys() == expected.keys()
    assert len(found) == 4
    for name in found.keys() - {"captions.txt"}:
        a, b = (np.asarray(Image.open(tmp_path / place / name), int) for place in ("read", "given"))
        assert np.abs(a - b).max() <= 2


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\n \n", r"has no prompts; write one a line"), (b"\xff\xfe\x00", r"not a readable text file")],
)
def test_a_file_without_prompts_is_refused(folder, tmp_path, content, message):
    (tmp_path / "p.txt").write_bytes(content)
    with pytest.raises(UserError, match=rf"--prompts .*p\.txt: {message}"):
        generate(folder, "--prompts", tmp_path / "p.txt", "--out", tmp_path / "out")
    with pytest.raises(UserError, match=r"--prompts .*none\.txt: not a readable text file"):
        generate(folder, "--prompts", tmp_path / "none.txt", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_any_key_of_sampling_is_an_option(folder, tmp_path):
    outs = [tmp_path / name for name in "abc"]
    options = ["--option", "negative_prompt=grey", "--option", "guidance_scale=5"]
    generate(folder, "--prompt", "x", "--out", outs[0])
    generate(folder, "--prompt", "x", *options, "--out", outs[1])
    assert contents(outs[0])["0-x.png"] != contents(outs[1])["0-x.png"]
    for option, message in (
        ("temprature=1", r"unknown key 'temprature'; did you mean 'temperature'"),
        ("top_p=2", r"'top_p': it must be > 0 and <= 1 \(got 2\)"),
        ("top_p", r"not of the form key.path=value"),
    ):
        with pytest.raises(UserError, match=message):
            generate(folder, "--prompt", "x", "--option", option, "--out", outs[2])
