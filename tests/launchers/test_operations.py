"""docs/operations.md: its commands and options exist, its scripts too, and its dry run runs."""

import re
import shlex

import pytest
import typer
from typer.testing import CliRunner

from megafusion.cli import app
from megafusion.train.run_folder import FREE_KEYS, RECIPE_KEYS
from tests.support.small import ROOT

PAGE = (ROOT / "docs/operations.md").read_text()
BLOCKS = re.findall(r"^```\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
LINES = [line for block in BLOCKS for line in block.replace("\\\n", "").splitlines()]


def arguments_of(line: str) -> list[str] | None:
    """Arguments of megafusion in a line, also behind evaluate.sbatch or preprocess.sbatch; else None."""
    words = shlex.split(line)
    if words[0] == "megafusion":
        return words[1:]
    for index, word in enumerate(words):
        if word.endswith("evaluate.sbatch"):
            return words[index + 1 :]
        if word.endswith("preprocess.sbatch"):
            return ["preprocess", *words[index + 1 :]]
    return None


@pytest.mark.parametrize("line", [line for line in LINES if arguments_of(line)])
def test_a_command_takes_the_page_s_arguments(line):
    command, arguments = typer.main.get_command(app), arguments_of(line)
    if arguments == ["--version"]:
        return
    while hasattr(command, "commands"):
        name, *arguments = arguments
        command = command.commands[name]
    assert command.make_context(command.name, arguments).params


def test_the_page_s_scripts_exist():
    scripts = re.findall(r"(?<![\w/])(launchers/[\w./-]+|configs/[\w./-]+yaml)", "\n".join(LINES))
    assert len(scripts) > 8
    for script in scripts:
        if "/mine." not in script:
            assert (ROOT / script).exists(), script


def test_the_7b_run_of_the_page_can_be_launched(monkeypatch):
    monkeypatch.chdir(ROOT)
    (line,) = [line for line in LINES if "--dry-run" in line]
    arguments = arguments_of(line.replace("--site mine", "--site example"))
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "#SBATCH --nodes=16" in result.stdout


def test_every_key_that_may_change_is_on_the_page():
    for key in FREE_KEYS + RECIPE_KEYS:
        assert f"`{key}*`" in PAGE or f"`{key}`" in PAGE, key
