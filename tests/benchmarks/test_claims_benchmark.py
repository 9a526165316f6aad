"""The claims' figures: gathered from run folders, paired by seed, with the signs that were committed."""

import json
import runpy
from types import SimpleNamespace

import pytest

from megafusion.errors import UserError
from tests.support.small import ROOT


@pytest.fixture
def claims(monkeypatch) -> SimpleNamespace:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return SimpleNamespace(**runpy.run_path(str(ROOT / "benchmarks/claims.py")))


@pytest.fixture
def runs() -> dict[str, dict]:
    """Runs of two arms and two seeds, and one that is not finished."""
    found = {}
    for arm, seed, loss, both, state in (
        ("a", "0", 0.5, 0.4, "finished"),
        ("a", "1", 0.6, 0.5, "finished"),
        ("b", "0", 0.7, 0.3, "finished"),
        ("b", "1", 0.7, 0.2, "finished"),
        ("c", "1", 9.0, 0.9, "training"),
    ):
        figures = {"seconds": 1.0, "validation_image_loss": loss, "images/held-out/both_accuracy": both}
        found[f"{arm},seed={seed}"] = {
            "state": state,
            "arm": arm,
            "point": {"seed": seed},
            "metrics": figures,
        }
    return found


def test_figures_of_finished_runs_are_paired_by_seed(claims, runs):
    found = claims.compare(runs, "a", "b")
    accuracy = found["images/held-out/both_accuracy"]
    assert (accuracy["a"], accuracy["b"]) == pytest.approx((0.45, 0.25))
    assert (accuracy["difference"], accuracy["std"]) == pytest.approx((0.2, 0.02**0.5))
    assert "| images/held-out/both_accuracy | 0.45 | 0.25 | +0.2 ± 0.14 | 2 |" in claims.difference_table(
        found
    )
    assert "seconds" not in found
    del runs["b,seed=0"]
    assert claims.compare(runs, "a", "b")["validation_image_loss"]["difference"] == pytest.approx(-0.1)
    with pytest.raises(UserError, match="no seed has finished runs of both a and c"):
        claims.compare(runs, "a", "c")


def test_losses_beside_those_of_codes_are_left_out(claims, runs):
    for seed in (0, 1):
        figures = runs[f"b,seed={seed}"]["metrics"]
        figures["validation_text_loss"] = figures.pop("validation_image_loss")
    for run in runs.values():
        run["metrics"]["validation_loss"] = 1.0
    assert list(claims.compare(runs, "a", "b")) == ["images/held-out/both_accuracy"]


def test_a_difference_of_the_other_sign_is_named(claims, runs):
    found = claims.compare(runs, "a", "b")
    right = {"images/held-out/both_accuracy": 1, "validation_image_loss": -1}
    assert claims.check_signs(found, right) == []
    wrong = claims.check_signs(found, {"images/held-out/both_accuracy": -1, "validation_image_loss_t3": 1})
    assert wrong == [
        "validation_image_loss_t3: not measured",
        "images/held-out/both_accuracy: +0.2, and below 0 before",
    ]


@pytest.mark.parametrize(
    ("name", "arms"), [("signs-a", ("transfusion", "quantized")), ("signs-b", ("patch-2", "patch-2-causal"))]
)
def test_committed_signs_are_of_committed_figures_of_every_seed(claims, name, arms):
    folder = ROOT / "benchmarks/results/claims"
    runs, signs = (
        claims.read_runs(folder / "small.json", ""),
        json.loads((folder / f"{name}.json").read_text()),
    )
    seeds = {run["point"]["seed"] for run in runs.values()}
    assert len(seeds) > 1
    for seed in seeds:
        of_seed = {key: run for key, run in runs.items() if run["point"]["seed"] == seed}
        assert claims.check_signs(claims.compare(of_seed, *arms), signs) == []


def test_the_halves_of_a_loss_are_means_of_their_five_ranges(claims, tmp_path):
    metrics = {f"validation_image_loss_t{bucket}": 2.0**bucket for bucket in range(10)}
    runs = {"a": {"metrics": metrics}, "b": {"metrics": {"validation_image_loss_t0": 1.0}}}
    (tmp_path / "sweep.json").write_text(json.dumps({"runs": runs}))
    found = claims.read_runs(tmp_path / "sweep.json", "")
    assert found["a"]["metrics"]["validation_image_loss_less_noised"] == 31 / 5
    assert found["a"]["metrics"]["validation_image_loss_more_noised"] == 31 * 32 / 5
    assert found["b"] == runs["b"]
