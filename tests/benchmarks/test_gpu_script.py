"""benchmarks/gpu.sh: without a GPU it runs to its end, and names each step that it skips."""

import os
import re
import subprocess
import sys

import pytest
import torch

from tests.support.small import ROOT


@pytest.mark.full
@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_it_runs_to_its_end_and_names_what_it_skips(tmp_path):
    environment = os.environ | {"PYTHON": sys.executable}
    command = ["bash", "benchmarks/gpu.sh", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    steps = re.findall(r"^=== \d+ s: (.*)$", done.stdout, re.MULTILINE)
    skipped = [step.removesuffix(": skipped, no GPU") for step in steps if "no GPU" in step]
    assert {"ceilings", "tiles", "1.4b-micro-batch-4", "attention against its peers"} <= set(skipped)
    assert steps[-1] == "end"
    assert not [step for step in steps if "FAILED" in step or "stopped" in step], done.stdout
    assert "correctness of the engine" in steps
    assert (tmp_path / "out/log.txt").read_text()
