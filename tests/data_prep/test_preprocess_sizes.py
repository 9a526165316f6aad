"""Images of several aspect ratios: each goes to the nearest size, up to the images that a run draws."""

import json
import random
import re
import shlex

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from pyarrow import Table, parquet
from typer.testing import CliRunner

from data_prep.config import PreprocessConfig
from data_prep.preprocess import ShardRange, preprocess
from data_prep.write import to_webp
from megafusion.cli import app
from megafusion.config import load_config, parse_config
from megafusion.data.images import decode_pixels
from megafusion.data.reader import ShardFolder
from megafusion.errors import UserError
from megafusion.images.processor import preprocess_images
from megafusion.train.config import RunConfig
from tests.support.raw import drawing, encoded, kill_in_the_middle, made_files
from tests.support.sizes import ASPECTS, PIXELS, SIZES, write_raw
from tests.support.small import ROOT

NEAREST = (0, 1, 2, 0, 2, 1)


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    return write_raw(tmp_path_factory.mktemp("sizes") / "raw")


@pytest.fixture
def inputs(raw) -> dict:
    return {"images": (raw,), "image_sizes": PIXELS, "documents_per_shard": 5, "batch_size": 3}


def all_documents(folder):
    shards = ShardFolder(folder)
    return [shards.read(document) for document in range(len(shards))]


def test_each_image_is_encoded_at_the_size_nearest_to_it(make, inputs, tmp_path, codec):
    (made,) = make(**inputs)
    assert made.latent_shapes == tuple((4, *size) for size in SIZES)
    assert made.images_by_size == {"12x4": 8, "6x10": 8, "8x8": 8}
    report = json.loads((tmp_path / "out/pairs/report.json").read_text())
    assert report["images_by_size_of_latents"] == made.images_by_size
    for number, document in enumerate(all_documents(tmp_path / "out/pairs")):
        size = NEAREST[number % len(ASPECTS)]
        image = drawing(number, ASPECTS[number % len(ASPECTS)])
        mean, log_variance = codec.encode(preprocess_images([image], *PIXELS[size]))
        expected = torch.stack([mean[0], log_variance[0]]).half().numpy()
        np.testing.assert_allclose(document.segments[1].data, expected, rtol=1e-2, atol=1e-2)


def test_the_manifest_of_one_size_has_no_fields_for_several(make, inputs, tmp_path):
    """Earlier versions, without several sizes, read it."""
    make(**inputs | {"image_sizes": PIXELS[:1]})
    values = json.loads((tmp_path / "out/pairs/manifest.json").read_text())
    assert not {"more_sizes", "images_by_size"} & set(values)
    assert ShardFolder(tmp_path / "out/pairs").manifest.count_by_size == {(8, 8): 24}
    report = json.loads((tmp_path / "out/pairs/report.json").read_text())
    assert report["images_by_size_of_latents"] == {"8x8": 24}


def test_tasks_in_any_order_and_after_any_kill_give_the_same_bytes(settings, inputs, tmp_path):
    def config(name: str) -> PreprocessConfig:
        return PreprocessConfig(**settings | inputs | {"out": tmp_path / name})

    preprocess(config("one"))
    expected = made_files(tmp_path / "one/pairs")
    assert sum(name.endswith(".tar") for name in expected) == 5
    for index in (1, 0):
        preprocess(config("two"), ShardRange(index, 2))
    assert made_files(tmp_path / "two/pairs") == expected
    chance = random.Random(0)
    for moment in (0, 1, 2, 4):
        kill_in_the_middle(config("killed"), moment, chance.uniform(0, 0.01))
    preprocess(config("killed"))
    assert made_files(tmp_path / "killed/pairs") == expected


def test_images_of_documents_go_to_the_nearest_size_too(make, inputs, tmp_path):
    images = [encoded(drawing(n, ASPECTS[n])) for n in range(3)]
    rows = [{"texts": ["a", None, "b", None], "images": [None, *images[:1], None, images[2]]}]
    parquet.write_table(Table.from_pylist(rows), tmp_path / "d.parquet")
    (made,) = make(**inputs | {"images": (), "documents": (tmp_path / "d.parquet",)})
    (document,) = all_documents(tmp_path / "out/interleaved")
    assert [s.data.shape for s in document.segments if s.kind == "moments"] == [(2, 4, 8, 8), (2, 4, 12, 4)]
    assert made.images_by_size == {"12x4": 1, "8x8": 1}


def test_the_same_sizes_are_up_to_date_and_others_rewrite_the_shards(make, inputs, tmp_path, capsys):
    make(**inputs)
    first = made_files(tmp_path / "out/pairs")
    capsys.readouterr()
    make(**inputs)
    assert "up to date" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(UserError, match=r"out/pairs: holds 24 documents made with other.* image_sizes"):
        make(**inputs | {"image_sizes": PIXELS[:2]})
    assert made_files(tmp_path / "out/pairs") == first
    make(**inputs | {"image_sizes": PIXELS[:2]}, overwrite=True)
    assert made_files(tmp_path / "out/pairs") != first


def test_images_stored_as_pixels_cover_the_nearest_size(make, inputs, tmp_path):
    make(**inputs, image_storage="pixels")
    for number, document in enumerate(all_documents(tmp_path / "out/pairs")):
        height, width = PIXELS[NEAREST[number % len(ASPECTS)]]
        stored = decode_pixels(document.segments[1].data)
        given = ASPECTS[number % len(ASPECTS)]
        assert stored.width >= min(width, given[0])
        assert stored.height >= min(height, given[1])
        assert stored.width <= width + 1 or stored.height <= height + 1 or stored.size == given
    # A square size is covered by the shorter side.
    assert decode_pixels(to_webp(Image.new("RGB", (90, 60)), 32, 32)).size == (48, 32)
    assert decode_pixels(to_webp(Image.new("RGB", (20, 90)), 32, 32)).size == (20, 90)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([[24, 40], [24, 40]], "24x40 has the aspect ratio of 24x40"),
        ([[32, 32]], "32x32 has the aspect ratio of 32x32"),
        ([[64, 64]], "64x64 has the aspect ratio of 32x32"),
        ([[48, 80], [24, 40]], "24x40 has the aspect ratio of 48x80"),
        ([[0, 40]], r"image_sizes\.1\.0.*greater than 0"),
        ([[24, 41]], r"image size 24 x 41: this autoencoder needs multiples of 4 pixels"),
    ],
)
def test_invalid_sizes_are_refused(settings, inputs, tmp_path, sizes, message):
    values = settings | {"images": inputs["images"], "image_sizes": [[32, 32], *sizes]}
    values = {key: value if isinstance(value, int | list) else str(value) for key, value in values.items()}
    values["images"] = [str(path) for path in inputs["images"]]
    with pytest.raises(UserError, match=message):
        preprocess(parse_config(PreprocessConfig, values, "test"))
    assert not (tmp_path / "out/pairs").exists()


def test_the_example_of_the_docs_is_complete(tmp_path):
    """Both files parse, and the command sets what the second file does."""
    section = (ROOT / "docs/data.md").read_text().split("\n## Several sizes\n")[1].split("\n## ")[0]
    first, second = re.findall(r"^```yaml\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    (tmp_path / "sizes.yaml").write_text(first)
    pixels = load_config(PreprocessConfig, tmp_path / "sizes.yaml").image_sizes
    (command,) = re.findall(r"^megafusion train (.*?)\nmegafusion", section, re.MULTILINE | re.DOTALL)
    path, *overrides = shlex.split(command.replace("\\\n", " "))
    plain, run = load_config(RunConfig, ROOT / path), load_config(RunConfig, ROOT / path, overrides)
    assert run.model.image_sizes == pixels
    assert run.model.vocab_size == plain.model.vocab_size + 2
    written = yaml.safe_load(second)
    for key, value in written["model"].items():
        assert json.loads(run.model_dump_json())["model"][key] == value
    assert run.data.sources["pairs"].path == written["data"]["sources"]["pairs"]["path"]


def megafusion(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if done.exception is not None:
        raise done.exception
    return done.stdout


def test_from_a_folder_of_images_to_images_of_each_size(settings, inputs, mixed_values, tmp_path):
    """The commands of docs/data.md, with a smaller model."""
    config = {"out": str(tmp_path / "out"), "images": [str(inputs["images"][0])]}
    config |= {"tokenizer": str(settings["tokenizer"]), "vae": str(settings["vae"])}
    config |= {"image_sizes": [list(size) for size in PIXELS]}
    (tmp_path / "preprocess.yaml").write_text(yaml.safe_dump(config))
    megafusion("preprocess", tmp_path / "preprocess.yaml")
    pairs, page = tmp_path / "out/pairs", tmp_path / "page.png"
    text = megafusion("data", "inspect", pairs, "--vae", settings["vae"], "--out", page, "--num", 6)
    assert all(f"{shape}: 8 images" in text for shape in ("4 x 8 x 8", "4 x 6 x 10", "4 x 12 x 4"))
    shown = np.asarray(Image.open(page).convert("L"))
    assert shown.std() > 10
    # The second image shown is 48 high and 16 wide: white beside it, in its cell of 96 pixels.
    cell = shown[8:104, 12 + 112 : 12 + 112 + 96]
    assert (cell[:, :24] == 255).all()
    assert (cell[:, -24:] == 255).all()
    assert cell[:, 40:56].std() > 3
    mixed_values["data"]["sources"] = {"pairs": {"path": str(pairs)}}
    mixed_values["train"] |= {"num_steps": 3}
    mixed_values["samples"] = {"every": 3, "num_pairs": 6}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(mixed_values))
    megafusion("train", tmp_path / "run.yaml")
    run = tmp_path / "run"
    assert Image.open(run / "samples/step-00000003.png").size[0] > 400
    for height, width in PIXELS:
        out = tmp_path / f"{height}x{width}"
        megafusion("generate", run, "--prompt", "x", "--size", f"{height}x{width}", "--out", out)
        assert Image.open(out / "0-x.png").size == (width, height)
    with pytest.raises(UserError, match=r"size \(40, 24\): the model has 32x32, 24x40, 48x16"):
        megafusion("generate", run, "--prompt", "x", "--size", "40x24", "--out", tmp_path / "none")
    with pytest.raises(UserError, match="--size is for drawn images"):
        megafusion("generate", run, "--image", page, "--size", "32x32", "--out", tmp_path / "none")
    assert not (tmp_path / "none").exists()
