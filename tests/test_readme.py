"""README: its commands run, in order, and the quickstart's report has its figures."""

import json
import re
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from data_prep.emoji import report as report_module
from tests.support.documents import code_blocks, keep_few_shapes, run_line, shell_lines
from tests.support.marks import full

ROOT = Path(__file__).parents[1]
REPORT_KEYS = {
    "num_steps",
    "seconds_total",
    "seconds_train",
    "peak_memory_bytes",
    "lm_loss_first",
    "lm_loss_last",
    "diffusion_loss_first",
    "diffusion_loss_last",
    "concept_top1",
    "caption_exact",
    "tokens_per_second",
}


README = ROOT / "README.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder like a fresh clone, with a quickstart run of three steps."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("configs", "data_prep", "docs"):
        (folder / name).symlink_to(ROOT / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'kernels'}")
        run_line("megafusion preprocess configs/preprocess/quickstart.yaml")
        run_line("megafusion train configs/quickstart.yaml telemetry.log_every=1")
    return folder


def test_the_two_commands_stand_alone_and_are_targets():
    first = code_blocks(README)[0].split("\n")[:-1]
    assert first == ["make quickstart", "make test"]
    for command in first:
        subprocess.run([*command.split(), "-n"], cwd=ROOT, check=True, capture_output=True)


def test_make_quickstart_runs_what_these_tests_run():
    shown = subprocess.run(["make", "-n", "quickstart"], cwd=ROOT, check=True, capture_output=True, text=True)
    for command in (
        "preprocess configs/preprocess/quickstart.yaml",
        "train configs/quickstart.yaml",
        "report runs/",
    ):
        assert f"megafusion {command}" in shown.stdout


# 8 pairs stand for all.
@pytest.mark.parametrize("num_pairs", [8, *full(132)])
def test_the_report_has_its_figures_and_pictures(folder, monkeypatch, num_pairs):
    monkeypatch.chdir(folder)
    all_pairs = report_module.training_pairs
    monkeypatch.setattr(report_module, "training_pairs", lambda *inputs: all_pairs(*inputs)[:num_pairs])
    monkeypatch.setattr(report_module, "NUM_DRAWN", min(num_pairs, report_module.NUM_DRAWN))
    run_line("megafusion report runs/quickstart --seconds-before 12")
    report = json.loads((folder / "runs/quickstart/report.json").read_text())
    assert report.keys() >= REPORT_KEYS
    assert report["num_steps"] == 2
    assert report["seconds_total"] > 12
    assert 0 <= report["concept_top1"] <= 1
    assert 0 <= report["caption_exact"] <= 1
    assert report["lm_loss_first"] == pytest.approx(7.6, abs=0.4)  # nearly log 2048
    assert report["diffusion_loss_first"] == pytest.approx(1.0, abs=0.3)  # nearly the target's variance
    assert 2e8 < report["peak_memory_bytes"] < 4 * 2**30
    for name in ("samples.png", "losses.png"):
        assert min(Image.open(folder / "runs/quickstart" / name).size) > 300
    lines = (folder / "runs/quickstart/captions.txt").read_text().splitlines()[1:]
    assert len(lines) == num_pairs
    assert all(re.match(r"[=x] .+ -> ", line) for line in lines)


# The report above and the example in Python below stand for README's commands.
@pytest.mark.full
def test_every_command_runs(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'kernels'}")
    lines = shell_lines(README)
    assert len(lines) >= 12
    for line in lines:
        run_line(line)
        if "draw.py" in line:
            keep_few_shapes(Path("data/shapes"))
    assert Path("drawn/0-red-apple-3d-style.png").is_file()


def test_the_python_example_runs(folder, monkeypatch):
    monkeypatch.chdir(folder)
    (example,) = code_blocks(README, "python")
    names: dict = {}
    exec(example, names)
    assert isinstance(names["image"], Image.Image)
    assert isinstance(names["caption"], str)
    assert isinstance(names["answer"], list)


def test_the_python_api_page_runs(folder, monkeypatch):
    monkeypatch.chdir(folder)
    names = {}
    for block in code_blocks(ROOT / "docs/python-api.md", "python"):
        exec(compile(block, "docs/python-api.md", "exec"), names)
    assert names["outcome"] == "finished"
    assert names["num_parameters"] == pytest.approx(0.16e9, rel=0.2)
    assert names["image"].size == (64, 64)
