"""`megafusion data`: contents of shards are shown, and altered files are named."""

import shutil

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from megafusion.cli import app
from megafusion.errors import UserError


def data(*arguments: object) -> str:
    """The output of a `megafusion data ...` command."""
    done = CliRunner().invoke(app, ["data", *map(str, arguments)])
    if done.exception is not None:
        raise done.exception
    return done.stdout


def test_pairs_are_counted_and_shown(shards, vae_folder, tmp_path):
    page = tmp_path / "page.png"
    text = data("inspect", shards / "pairs", "--vae", vae_folder, "--out", page, "--num", 6)
    assert "22 in 3 shards" in text
    assert "4 x 8 x 8" in text
    assert np.asarray(Image.open(page)).std() > 10
    assert Image.open(page).size[1] > 200  # two lines of cells


def test_text_is_counted(shards):
    text = data("inspect", shards / "text", "--num", 1000)
    assert "40 in 5 shards" in text
    assert "tokens of 40 documents" in text


def test_another_autoencoder_is_refused(shards, tmp_path):
    with pytest.raises(UserError, match=r"is not the autoencoder that made the latents.*--vae"):
        data("inspect", shards / "pairs", "--out", tmp_path / "page.png")
    assert not (tmp_path / "page.png").exists()


def test_intact_shards_pass(shards):
    assert "40 documents, as they were written" in data("verify", shards / "text")


@pytest.mark.parametrize("damaged", ["shard-000001.tar", "shard-000002.index.npy"])
@pytest.mark.parametrize("position", [0.001, 0.5, 0.95])
def test_the_altered_file_is_named(shards, tmp_path, damaged, position):
    folder = shutil.copytree(shards / "pairs", tmp_path / "pairs")
    content = bytearray((folder / damaged).read_bytes())
    content[int(position * len(content))] ^= 1
    (folder / damaged).write_bytes(content)
    with pytest.raises(UserError, match=damaged.replace(".", r"\.")):
        data("verify", folder)
