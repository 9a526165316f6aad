"""The code blocks of a document, and its shell lines run in this process."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner

from megafusion.cli import app
from tests.support.small import ROOT

SHORT = "train.num_steps=2 checkpoint.every=2 samples.every=0"
"""Overrides that cut a documented training short."""


def code_blocks(path: Path, language: str = "") -> list[str]:
    """The fenced code blocks of a Markdown file in one language."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL)
    return [content for name, content in fenced if name == language]


def shell_lines(path: Path) -> list[str]:
    """The lines of the blocks without a language, continued lines joined."""
    lines = [line for block in code_blocks(path) for line in block.replace("\\\n", "").splitlines()]
    return [line for line in lines if re.match(r"megafusion|python|make|tensorboard|DS_ACC|deepspeed", line)]


def run_line(line: str) -> None:
    """Run a documented line in the working folder, a training for two steps only."""
    words = shlex.split(line, comments=True)
    if words[0] == "megafusion":
        words += SHORT.split() if words[1] == "train" else []
        result = CliRunner().invoke(app, words[1:], catch_exceptions=False)
        assert result.exit_code == 0, result.output
    elif words[0] == "python":
        subprocess.run([sys.executable, *words[1:]], check=True)
    elif words[0] == "tensorboard":
        assert list(Path(words[2]).iterdir()), "no event files"
    elif words[0] == "make":
        subprocess.run([*words, "-n"], cwd=ROOT, check=True, capture_output=True)
    else:  # another launcher
        command = f"PATH={Path(sys.executable).parent}:$PATH {line.replace('train.num_steps=20', '')} {SHORT}"
        subprocess.run(command, shell=True, check=True)


def keep_few_shapes(folder: Path) -> None:
    """Leave 40 of the tutorial's images to train on and 3 held out."""
    for part, kept in (("train", 40), ("held-out", 3)):
        for image in sorted((folder / part).glob("*.png"))[kept:]:
            image.with_suffix(".txt").unlink()
            image.unlink()
