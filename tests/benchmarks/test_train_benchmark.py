"""benchmarks/train.py: its rows, its counts and its figures; not its times."""

import json
import sys

import numpy as np
import pytest
import yaml

from megafusion.config import parse_config
from megafusion.plan.adapters import adapter_layers, num_flops
from megafusion.plan.job import matrix_weights
from megafusion.sequence.document import IGNORED_LABEL
from megafusion.train.config import RunConfig
from tests.support.small import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import train as benchmark
from synthetic import SyntheticRows


@pytest.mark.parametrize("kind", ["mixed", "text", "pairs"])
def test_synthetic_rows_are_full_and_as_real_ones(run_values, kind):
    run_values["data"] |= {"sequence_length": 300, "images_per_row": 4}
    config = parse_config(RunConfig, run_values, "test")
    rows = SyntheticRows(config, kind)
    row = rows.next()
    images = int((row.image_start >= 0).sum())
    assert {"mixed": 1, "text": 0, "pairs": 2}[kind] <= images <= {"mixed": 4, "text": 0, "pairs": 4}[kind]
    assert ((row.patch_index >= 0).sum(1) == images * config.model.patches[0]).all()
    if kind != "pairs":
        assert (row.labels != IGNORED_LABEL).float().mean() > 0.4
        used = (row.positions > 0) | (row.labels != IGNORED_LABEL)
        assert used.float().mean() > 0.9
    assert int(row.tokens.max()) < config.model.vocab_size
    assert np.isfinite(row.latents).all()


def test_figures_of_a_run(run_values, tmp_path, monkeypatch, capsys):
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(run_values))
    command = ["train.py", str(config), "--rows", "mixed", "--steps", "2", "--warmup", "1", "--json", "-"]
    monkeypatch.setattr("sys.argv", command)
    benchmark.main()
    figures = json.loads(capsys.readouterr().out)
    assert all(figures[name] > 0 for name in (*benchmark.PHASES, "step_seconds", "tokens_per_second"))
    assert len(figures["losses"]) == 3
    parsed = parse_config(RunConfig, run_values, "test")
    model = parsed.model
    rows = SyntheticRows(parsed, "mixed")
    batches = [[rows.next() for _ in range(parsed.train.global_batch_size)] for _ in range(2)]
    images = sum(int((row.image_start >= 0).sum()) for batch in batches for row in batch) / 2
    positions = parsed.train.global_batch_size * parsed.data.sequence_length
    flops = 6 * model.num_layers * matrix_weights(model) * positions
    flops += 12 * model.hidden_size * model.num_layers * figures["visible_keys_per_query"] * positions
    flops += 6 * model.vocab_size * model.hidden_size * figures["text_target_share"] * positions
    adapter = adapter_layers(model)
    flops += 3 * images * (num_flops(adapter.down) + num_flops(adapter.up))
    assert figures["tflop_per_step"] == pytest.approx(flops / 1e12)
    pairs = [sum(int(row.intervals().dense_mask.sum()) for row in batch) for batch in batches]
    assert figures["visible_keys_per_query"] * positions == pytest.approx(sum(pairs) / 2)
