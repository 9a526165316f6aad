"""Fits of metrics against compute, on laws whose exponent and ratio are known."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from megafusion.cli import app
from megafusion.errors import UserError
from megafusion.sweep.config import load_sweep
from megafusion.sweep.fit import Law, Point, fit_arms, fit_law
from megafusion.sweep.members import expand
from tests.sweep.conftest import train

COMPUTES = (1e13, 3e13, 1e14, 3e14, 1e15)


def law_points(exponent, floor=0.0, ratio=1.0, scale=2.0, computes=COMPUTES, noise=0.0, seeds=1):
    """Runs of a law that needs `ratio` of the compute of the one without."""
    random = np.random.default_rng(1)
    return [
        Point(f"c{compute}", compute, floor + scale * (compute / ratio / 1e14) ** -exponent * each)
        for compute in computes
        for each in 1 + noise * random.standard_normal(seeds)
    ]


@settings(max_examples=25)
@given(
    exponent=st.floats(0.05, 1.0),
    floor=st.floats(0.0, 3.0),
    ratio=st.floats(0.03, 20.0),
    sign=st.sampled_from([1.0, -1.0]),
)
def test_exponent_and_parity_ratio_of_a_known_law_are_found(exponent, floor, ratio, sign):
    scale = 2.0 * sign
    arms = {"base": law_points(exponent, floor, scale=scale)}
    arms["ours"] = law_points(exponent, floor, ratio, scale)
    found = fit_arms(arms, "base")["arms"]
    assert found["ours"]["exponent"] == pytest.approx(exponent, rel=1e-2)
    assert found["ours"]["parity"] == pytest.approx(ratio, rel=1e-2)
    assert found["base"]["parity"] == pytest.approx(1.0)
    assert found["ours"]["parity_interval"] is None, "one seed has no spread"


@given(exponent=st.floats(-1.0, 1.0).filter(lambda e: abs(e) > 0.02), ratio=st.floats(0.03, 20.0))
def test_two_sizes_give_a_law_without_a_floor(exponent, ratio):
    """Also one that rises, as accuracy does."""
    two = COMPUTES[:2]
    arms = {"a": law_points(exponent, computes=two), "b": law_points(exponent, ratio=ratio, computes=two)}
    found = fit_arms(arms, "a")["arms"]["b"]
    assert (found["exponent"], found["parity"]) == (pytest.approx(exponent), pytest.approx(ratio))
    assert found["floor"] == 0


def test_intervals_contain_the_truth_and_shrink_with_less_noise():
    spans = []
    for noise in (0.02, 0.002):
        arms = {
            "a": law_points(0.3, computes=COMPUTES[:3], noise=noise, seeds=5),
            "b": law_points(0.3, ratio=0.5, computes=COMPUTES[:3], noise=noise, seeds=5),
        }
        found = fit_arms(arms, "a")["arms"]["b"]
        low, high = found["parity_interval"]
        assert low < 0.525
        assert high > 0.475
        assert low < found["parity"] < high
        spans.append(high - low)
    assert spans[1] < spans[0] / 3


def test_a_value_that_is_never_reached_has_no_ratio():
    arms = {"a": law_points(0.5), "b": law_points(0.5, floor=5.0)}
    assert fit_arms(arms, "a")["arms"]["b"]["parity"] is None


def test_what_cannot_be_fitted_is_named():
    with pytest.raises(UserError, match="b: a fit needs the metric at two computes or more, and has 1"):
        fit_arms({"a": law_points(0.3), "b": law_points(0.3)[:1]}, "a")
    with pytest.raises(UserError, match="--baseline 'c': no arm of the sweep; they are a"):
        fit_arms({"a": law_points(0.3)}, "c")
    with pytest.raises(UserError, match=r"a: no power law fits its runs: .* above 0"):
        fit_arms({"a": law_points(0.3, scale=-1.0)[:2]}, "a")
    with pytest.raises(ValueError, match="above 0"):
        fit_law(law_points(0.3, scale=-1.0)[:2])


def test_a_law_that_is_nearly_flat_reaches_another_value_at_no_compute():
    assert Law(1.0, 0.0, 1.0, 1e-4).compute_for(0.5) == math.inf
    assert Law(1.0, 0.0, 1.0, 0.5).compute_for(0.5) == pytest.approx(4.0)


def test_options_that_would_have_no_effect_are_refused(sweep_file):
    for options, way_out in (
        (["--fit", "text_loss"], "add --report"),
        (["--report", "--baseline", "plain"], "add --fit"),
        (["--nodes", "2"], "add --site"),
        (["--time", "1:00:00"], "add --site"),
        (["--launcher", "srun"], "add --site"),
    ):
        result = CliRunner().invoke(app, ["sweep", str(sweep_file), *options])
        assert str(result.exception).endswith(way_out), options
    assert not (sweep_file.parent / "sweep").exists()


def test_the_command_fits_plots_and_writes_the_ratio(sweep_file, tmp_path):
    changes = ["grid={seed: [0, 1], train.num_steps: [10, 20, 40]}", "--report"]
    result = CliRunner().invoke(app, ["sweep", str(sweep_file), *changes, "--fit", "text_loss"])
    assert "--fit text_loss: no finished run has it; there are no metrics yet" in str(result.exception)
    for member in expand(load_sweep(sweep_file, changes[:1]), "sweep.yaml"):
        steps, seed = member.num_steps, int(member.point["seed"])
        loss = (steps / {"plain": 1.0, "causal": 0.25}[member.arm]) ** -0.4 * (1 + 0.01 * seed)
        train(member, flops=steps * 1e9, text_loss=loss)
        if steps == 20:  # was stopped in the middle, where its learning rate is high
            (member.out / "starts.json").write_text('[{"ended": "preempted", "step": 15}]')
            (member.out / "metrics.jsonl").write_text('{"step": 15, "flops": 1.5e10, "text_loss": 9}\n')
    fit = ["--fit", "text_loss", "--baseline", "plain"]
    result = CliRunner().invoke(app, ["sweep", str(sweep_file), *changes, *fit])
    assert result.exit_code == 0, result.exception
    found = json.loads((tmp_path / "sweep/sweep.json").read_text())["fits"]["text_loss"]["arms"]["causal"]
    assert found["parity"] == pytest.approx(0.25, rel=1e-6)
    assert found["exponent"] == pytest.approx(0.4)
    assert (tmp_path / "sweep/sweep.text_loss.png").stat().st_size > 10_000
    assert "| text_loss | causal | 0.4 (" in result.stdout
