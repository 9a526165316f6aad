"""docs/tutorial.md: its commands run, in order, on fewer images and for fewer steps."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import yaml

from megafusion.config import load_config
from megafusion.train.config import RunConfig
from tests.support.documents import code_blocks, keep_few_shapes, run_line, shell_lines
from tests.support.small import ROOT

PAGE = ROOT / "docs/tutorial.md"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A working folder like a fresh clone."""
    for name in ("docs", "data_prep", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'kernels'}")
    return tmp_path


def test_every_command_runs(folder, capfd):
    for line in shell_lines(PAGE):
        run_line(line)
        if "draw.py" in line:
            assert len(list(Path("data/shapes/train").glob("*.png"))) == 1020
            assert len(list(Path("data/shapes/held-out").glob("*.txt"))) == 60
            keep_few_shapes(Path("data/shapes"))
    assert Path("data/shapes/shards/pairs/sheet.png").is_file()
    assert Path("drawn/0-a-large-red-ring-at-the-top-left.png").is_file()
    report, _, _ = capfd.readouterr().out.rpartition("held-out.png")
    assert json.loads(report[report.rindex('{\n "captions"') :])["captions"] == 3
    assert Path("held-out.png").is_file()


def test_the_judge_is_right_on_every_image(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs/tutorial")
    draw, judge = (runpy.run_path(str(ROOT / f"docs/tutorial/{name}.py")) for name in ("draw", "judge"))
    sys.modules.pop("draw", None)
    some = draw["combinations"]()[::9]
    assert [judge["judge"](draw["draw"](combination)) for combination in some] == some


def test_what_the_page_adds_is_valid(tmp_path):
    """The YAML that adds a validation, and text, fits the tutorial's training file."""
    values = yaml.safe_load((ROOT / "docs/tutorial/train.yaml").read_text())
    for added in map(yaml.safe_load, code_blocks(PAGE, "yaml")):
        for section, keys in added.items():
            values[section] |= keys
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    config = load_config(RunConfig, tmp_path / "run.yaml")
    assert set(config.data.sources) == {"pairs", "text"}
    assert config.checkpoint.keep_best
