"""Short form of `make test-faults`: each fault once or twice, on real processes.

Quick tests stand for those marked full: of kills, tests/train/test_lost_rank.py; of preemption,
tests/train/test_preemption.py; of NaN gradients, tests/resilience/test_skipped_steps.py; of a slow disk and
flipped bits, tests/checkpoint/test_checkpoint.py.
"""

import os

import pytest

from tests.faults import cases
from tests.faults.cases import Bench, Case
from tests.support.marks import full


@pytest.fixture(scope="module")
def bench(tmp_path_factory, shards, vae_folder) -> Bench:
    return Bench(tmp_path_factory.mktemp("faults"), shards, vae_folder)


def assert_survived(case: Case, tried: int) -> None:
    assert case.failures == []
    assert (case.tried, case.lost) == (tried, 0)


@pytest.mark.full
def test_kills(bench):
    assert_survived(cases.kills(bench, 2, seed=1), 2)


@pytest.mark.full
def test_preemptions(bench):
    assert_survived(cases.preemptions(bench, 2, seed=3), 2)


@pytest.mark.full
def test_nan_in_the_gradient_of_one_rank(bench):
    assert_survived(cases.nans(bench, victims=(1,)), 1)


@pytest.mark.full
def test_rollback(bench):
    assert_survived(cases.rollback(bench), 1)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small tmpfs")
@pytest.mark.parametrize("policy", full("stop", "continue"))
def test_full_disk(bench, policy):
    assert_survived(cases.refusing_disk(bench, "full", policy), 1)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small tmpfs")
@pytest.mark.parametrize("policy", full("continue", "stop"))
def test_full_disk_of_the_whole_run(bench, policy):
    assert_survived(cases.full_run_folder(bench, policy), 1)


@pytest.mark.full
def test_slow_disk(bench):
    assert_survived(cases.slow_saves(bench, "continue"), 1)


@pytest.mark.full
def test_flipped_bits(bench):
    case = cases.flipped_bits(bench, each=1, names=("manifest.json", "tensors/__1_0.distcp"))
    assert_survived(case, 2)
