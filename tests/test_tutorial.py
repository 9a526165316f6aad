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

PAGE, EDITING = ROOT / "docs/tutorial.md", ROOT / "docs/editing.md"


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


@pytest.mark.full
def test_every_command_of_the_page_about_edits_runs(folder, capfd):
    """From a quickstart of two steps, with four edits held out."""
    run_line("megafusion preprocess configs/preprocess/quickstart.yaml")
    run_line("megafusion train configs/quickstart.yaml")
    for line in shell_lines(EDITING):
        run_line(line)
        held_out = Path("data/edits/raw/held-out.jsonl")
        held_out.write_text("".join(held_out.read_text().splitlines(keepends=True)[:4]))
    (python,) = code_blocks(EDITING, "python")
    exec(python, {})
    assert Path("runs/edits/edits.png").is_file()
    assert '"all": {\n  "edits": 4,' in capfd.readouterr().out


def test_edits_that_are_held_out_are_not_trained_on(folder):
    run_line("python docs/tutorial/edits.py edits")
    documents, held_out = (
        [json.loads(line) for line in Path(f"edits/{name}.jsonl").read_text().splitlines()]
        for name in ("documents", "held-out")
    )
    trained = {(images[0], images[2]) for images in (document["images"] for document in documents)}
    kept = {(f"{edit['source']}.webp", f"{edit['target']}.webp") for edit in held_out}
    assert (len(trained), len(kept), len(trained & kept)) == (144, 48, 0)
    assert {source.partition("-")[0] for source, _ in kept} <= {key.partition("-")[0] for key, _ in trained}


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
