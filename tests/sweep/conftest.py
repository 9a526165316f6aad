"""A sweep of small runs."""

from pathlib import Path

import pytest
import yaml


@pytest.fixture
def sweep_file(run_values, tmp_path) -> Path:
    """Two arms with one seed, of which nothing is trained yet."""
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(run_values | {"telemetry": {"trackers": []}}))
    values = {
        "base": str(tmp_path / "config.yaml"),
        "out": str(tmp_path / "sweep"),
        "overrides": ["telemetry.log_every=1", "data.num_workers=0"],
        "runs": {"plain": [], "causal": ["model.num_layers=1"]},
        "grid": {"seed": [0]},
    }
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


@pytest.fixture
def texts(tmp_path) -> Path:
    """Three documents of held-out text."""
    path = tmp_path / "held-out.txt"
    path.write_text("a red apple\na ghost that is white\nwater\n")
    return path
