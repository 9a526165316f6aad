"""Documents: their links lead to files, their commands exist with their options, the API page's code runs."""

import re
import shlex
import subprocess

import pytest
import typer

from megafusion.cli import app
from tests.support.documents import code_blocks, shell_lines
from tests.support.small import ROOT

TRACKED = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True).stdout.split()
PAGES = [ROOT / name for name in TRACKED] or [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_to_files(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    targets = [link.partition("#")[0] for link in LINK.findall(text) if "://" not in link]
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing


def megafusion_lines() -> list[tuple[str, str]]:
    """(page, line) of every `megafusion ...` line in a code block of docs/."""
    lines = [(page, line) for page in sorted(ROOT.glob("docs/*.md")) for line in shell_lines(page)]
    return [(page.name, line) for page, line in lines if re.match(r"megafusion [a-z]", line)]


@pytest.mark.parametrize(("page", "line"), megafusion_lines())
def test_a_command_exists_with_its_options(page, line):
    _, *arguments = shlex.split(line, comments=True)
    command = typer.main.get_command(app)
    while hasattr(command, "commands"):
        name, *arguments = arguments
        command = command.commands[name]
    assert command.make_context(command.name, arguments).params


@pytest.mark.parametrize("page", sorted(ROOT.glob("docs/*.md")), ids=lambda page: page.name)
def test_python_blocks_are_valid(page):
    for block in code_blocks(page, "python"):
        compile(block, page.name, "exec")
