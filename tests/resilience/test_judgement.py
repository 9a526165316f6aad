"""Losses that jump, and when a run goes back."""

import math
from types import SimpleNamespace

import pytest

from megafusion.errors import UserError
from megafusion.resilience.config import HealthConfig
from megafusion.resilience.rollback import Rollback
from megafusion.resilience.spikes import Spikes


def spikes(**config) -> Spikes:
    found = Spikes(HealthConfig(**config))
    for number in range(64):
        found.add(2.0 + 0.1 * math.sin(number))
    return found


def test_a_jump_is_so_many_deviations_over_the_mean_of_the_losses_before():
    found = spikes(spikes="warn", spike_sigmas=6.0)
    deviation = 0.1 / math.sqrt(2)
    assert not found.is_spike(2.0 + 5.5 * deviation)
    assert found.is_spike(2.0 + 6.5 * deviation)
    assert not found.is_spike(1.0)  # better is no jump


def test_there_is_no_jump_before_there_are_losses_to_measure_it_by_nor_when_off():
    found = Spikes(HealthConfig(spikes="skip"))
    for _ in range(31):
        found.add(2.0)
        assert not found.is_spike(100.0)
    found.add(2.0)
    assert found.is_spike(100.0)
    assert not spikes(spikes="off").is_spike(100.0)


def test_losses_that_hardly_move_make_no_small_change_a_jump():
    found = Spikes(HealthConfig(spikes="warn"))
    for _ in range(128):
        found.add(2.0)
    assert not found.is_spike(2.1)
    assert found.is_spike(2.2)


def recovery(after: int) -> tuple[Rollback, SimpleNamespace]:
    import torch

    consensus = SimpleNamespace(
        is_skipped=True,
        is_finite=False,
        is_spike=False,
        losses=torch.tensor([math.nan, 1.0, math.nan]),
        spikes=spikes(spikes="skip"),
    )
    return Rollback(HealthConfig(roll_back_after=after), consensus), consensus


def test_a_run_goes_back_after_so_many_in_a_row_and_not_twice_to_the_same_checkpoint():
    found, consensus = recovery(3)
    for is_skipped in (True, True, False, True, True, True):
        assert not found.must_go_back
        consensus.is_skipped, consensus.is_finite = is_skipped, not is_skipped
        found.record_step(10)
    assert found.must_go_back
    assert found.go_back({"step": 8}) == 8
    assert not found.must_go_back
    assert found.figures() == {"skipped_steps": 5, "loss_spikes": 0, "rollbacks": 1}
    for _ in range(3):
        found.record_step(9)
    with pytest.raises(UserError, match="back to step 8, which is kept, before") as refused:
        found.go_back({"step": 8})
    assert refused.value.exit_status == 1


def test_without_a_checkpoint_the_run_ends():
    found, _ = recovery(1)
    assert "left out on all ranks" in found.record_step(0)
    with pytest.raises(UserError, match="no checkpoint to go back to"):
        found.go_back(None)


def test_counts_and_losses_come_back_from_a_checkpoint():
    found, consensus = recovery(9)
    found.record_step(0)
    consensus.spikes.add(3.0)
    other, its = recovery(9)
    other.restore({"step": 1, "health": found.state()})
    assert other.figures() == found.figures()
    assert list(its.spikes.losses) == list(consensus.spikes.losses)
    other.restore({"step": 1})  # of an older version
    assert other.figures()["skipped_steps"] == 0
