"""benchmarks/recipes.py: which figures it gives of each arm; not its times."""

import json
import sys

import pytest
import yaml

from tests.support.small import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import recipes as benchmark


@pytest.mark.full
def test_arms_beside_the_first(run_values, tmp_path, monkeypatch, capsys):
    base, sweep = tmp_path / "run.yaml", tmp_path / "sweep.yaml"
    base.write_text(yaml.safe_dump(run_values))
    arms = {"plain": [], "modality": ["model.modality_weights=all"]}
    values = {"base": str(base), "out": str(tmp_path / "out"), "runs": arms, "grid": {"seed": [0, 1]}}
    sweep.write_text(yaml.safe_dump(values, sort_keys=False))
    monkeypatch.setattr("sys.argv", ["recipes.py", str(sweep), "--rounds", "2"])
    benchmark.main()
    plain, modality = json.loads(capsys.readouterr().out)["arms"].values()
    assert plain["over_first"] == plain["over_first_by_clock"] == plain["peak_bytes_over_first"] == 1
    assert modality["quartiles"][0] <= modality["over_first"] <= modality["quartiles"][1]
    assert modality["parameters"] > plain["parameters"]
    assert modality["peak_bytes"] > 0
    assert not (tmp_path / "out").exists()
