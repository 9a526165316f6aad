"""The claims' figures: gathered from run folders, paired by seed, with the signs that were committed."""

import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

from megafusion.config import dump_config
from megafusion.errors import UserError
from tests.support.small import ROOT


@pytest.fixture
def claims(monkeypatch) -> SimpleNamespace:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return SimpleNamespace(**runpy.run_path(str(ROOT / "benchmarks/claims.py")))


@pytest.fixture
def sweep(run_config, tmp_path) -> Path:
    """Runs of two arms and two seeds, of which one is not finished."""
    for arm, seed, loss, both in (
        ("a", 0, 0.5, 0.4),
        ("a", 1, 0.6, 0.5),
        ("b", 0, 0.7, 0.3),
        ("b", 1, 0.7, 0.2),
    ):
        folder = tmp_path / f"{arm},seed={seed}"
        folder.mkdir()
        config = run_config.model_copy(
            update={"train": run_config.train.model_copy(update={"num_steps": 20}), "out": folder}
        )
        (folder / "config.yaml").write_text(dump_config(config))
        lines = [{"step": 10, "seconds": 1.0, "validation_image_loss": 2.0}, {"step": 20, "seconds": 2.0}]
        lines[1]["validation_image_loss"] = loss
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        metrics = {"held-out": {"both_accuracy": both, "images": 102}}
        report = folder / "evaluation-20/report.json"
        report.parent.mkdir()
        report.write_text(json.dumps({"suites": {"images": {"metrics": metrics}}}))
    for name in ("c,seed=0", "c,seed=1"):
        unfinished = tmp_path / name
        unfinished.mkdir()
        (unfinished / "config.yaml").write_text((tmp_path / "a,seed=0/config.yaml").read_text())
    (unfinished / "metrics.jsonl").write_text(json.dumps({"step": 10, "seconds": 1.0}) + "\n")
    return tmp_path


def test_figures_of_finished_runs_are_paired_by_seed(claims, sweep, capsys):
    runs = claims.collect(sweep)
    assert list(runs) == ["a,seed=0", "a,seed=1", "b,seed=0", "b,seed=1"]
    assert capsys.readouterr().err.count("not finished") == 2
    assert runs["a,seed=1"]["figures"]["validation_image_loss"] == 0.6
    found = claims.compare(runs, "a", "b")
    accuracy = found["images/held-out/both_accuracy"]
    assert (accuracy["a"], accuracy["b"]) == pytest.approx((0.45, 0.25))
    assert (accuracy["difference"], accuracy["std"]) == pytest.approx((0.2, 0.02**0.5))
    assert "| images/held-out/both_accuracy | 0.45 | 0.25 | +0.2 ± 0.14 | 2 |" in claims.table(found)
    assert "seconds" not in found
    codes = {name: run | {"figures": dict(run["figures"])} for name, run in runs.items()}
    for seed in (0, 1):
        figures = codes[f"b,seed={seed}"]["figures"]
        figures["validation_text_loss"] = figures.pop("validation_image_loss")
    for run in codes.values():
        run["figures"]["validation_loss"] = 1.0
    assert list(claims.compare(codes, "a", "b")) == ["images/held-out/both_accuracy"]
    del runs["b,seed=0"]
    assert claims.compare(runs, "a", "b")["validation_image_loss"]["difference"] == pytest.approx(-0.1)
    with pytest.raises(UserError, match="no seed has finished runs of both a and c"):
        claims.compare(runs, "a", "c")


def test_a_difference_of_the_other_sign_is_named(claims, sweep):
    found = claims.compare(claims.collect(sweep), "a", "b")
    right = {"images/held-out/both_accuracy": 1, "validation_image_loss": -1}
    assert claims.check_signs(found, right) == []
    wrong = claims.check_signs(found, {"images/held-out/both_accuracy": -1, "validation_image_loss_t3": 1})
    assert wrong == [
        "validation_image_loss_t3: not measured",
        "images/held-out/both_accuracy: +0.2, and below 0 before",
    ]
