"""The loader's benchmark runs, names its results, and names a missing peer."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def benchmark(*arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    command = [sys.executable, "benchmarks/loader.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.skipif(find_spec("streaming") is not None, reason="the peer is installed")
def test_a_missing_peer_is_named():
    done = benchmark()
    assert done.returncode == 1
    assert "mosaicml-streaming is not installed" in done.stderr
    assert "--without streaming" in done.stderr


@pytest.mark.full
def test_without_the_peer_it_prints_its_results():
    small = ("--pairs", "100", "--rounds", "1", "--batches", "1")
    done = benchmark("--without", "streaming", "--json", "-", *small)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures.keys() >= {"positions_per_second", "vs_webdataset", "fill", "first_batch_ms", "resume_ms"}
    assert figures["resume_ms"] < 2000
