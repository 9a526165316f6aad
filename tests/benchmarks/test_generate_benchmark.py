"""benchmarks/generate.py: its tokens are those of transformers; its file has its figures; not its times."""

import json
import subprocess
import sys

import pytest

from tests.support.generation import make_pipeline
from tests.support.small import ROOT


@pytest.mark.full
def test_figures_of_a_small_pipeline(run_config, tokenizer, codec, tmp_path):
    pipeline = make_pipeline(run_config, tokenizer, codec, num_steps=2)
    pipeline.config = pipeline.config.model_copy(update={"sequence_length": 96})
    pipeline.save_pretrained(tmp_path / "pipeline")
    command = [sys.executable, ROOT / "benchmarks/generate.py", tmp_path / "pipeline", "--batch", "1", "3"]
    sizes = ["--tokens", "9", "--steps", "2", "--runs", "1", "--json", tmp_path / "found.json"]
    subprocess.run([*map(str, command), *map(str, sizes)], check=True)
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert [(row["kind"], row["batch"]) for row in rows] == [
        ("text", 1),
        ("images", 1),
        ("text", 3),
        ("images", 3),
    ]
    assert all(row.get("images_per_second", 1) > 0 for row in rows)
    assert all(row["tokens_per_second decode"] > 0 for row in rows[::2])
