"""Loss spikes, and rollback to a checkpoint."""

import math
from types import SimpleNamespace

import pytest

from megafusion.errors import ExitStatus, UserError
from megafusion.resilience.config import ResilienceConfig
from megafusion.resilience.consensus import SpikeDetector
from megafusion.resilience.rollback import Rollback


def detector(**config) -> SpikeDetector:
    found = SpikeDetector(ResilienceConfig(**config))
    for number in range(64):
        found.add(2.0 + 0.1 * math.sin(number))
    return found


def test_a_spike_is_so_many_deviations_above_the_mean():
    found = detector(spikes="warn", spike_sigmas=6.0)
    deviation = 0.1 / math.sqrt(2)
    assert not found.is_spike(2.0 + 5.5 * deviation)
    assert found.is_spike(2.0 + 6.5 * deviation)
    assert not found.is_spike(1.0)  # a lower loss is not a spike


def test_there_are_no_spikes_before_32_losses_or_when_off():
    found = SpikeDetector(ResilienceConfig(spikes="skip"))
    for _ in range(31):
        found.add(2.0)
        assert not found.is_spike(100.0)
    found.add(2.0)
    assert found.is_spike(100.0)
    assert not detector(spikes="off").is_spike(100.0)


def test_a_small_change_of_a_flat_loss_is_not_a_spike():
    found = SpikeDetector(ResilienceConfig(spikes="warn"))
    for _ in range(128):
        found.add(2.0)
    assert not found.is_spike(2.1)
    assert found.is_spike(2.2)


def rollback(after: int) -> tuple[Rollback, SimpleNamespace]:
    import torch

    consensus = SimpleNamespace(
        is_skipped=True,
        is_finite=False,
        is_spike=False,
        losses=torch.tensor([math.nan, 1.0, 0.0, math.nan]),
        spikes=detector(spikes="skip"),
    )
    return Rollback(ResilienceConfig(roll_back_after=after), consensus), consensus


def test_a_run_rolls_back_after_consecutive_skips_and_not_twice_to_one_checkpoint():
    found, consensus = rollback(3)
    for is_skipped in (True, True, False, True, True, True):
        assert not found.is_due
        consensus.is_skipped, consensus.is_finite = is_skipped, not is_skipped
        found.record_step(10)
    assert found.is_due
    assert found.roll_back({"step": 8}) == 8
    assert not found.is_due
    assert found.counts == {"skipped_steps": 5, "loss_spikes": 0, "rollbacks": 1}
    for _ in range(3):
        found.record_step(9)
    with pytest.raises(UserError, match="rolled back to step 8, which is kept, before") as refused:
        found.roll_back({"step": 8})
    assert refused.value.exit_status == ExitStatus.FAILED


def test_without_a_checkpoint_the_run_fails():
    found, _ = rollback(1)
    assert "skipped on all ranks" in found.record_step(0)
    with pytest.raises(UserError, match="no checkpoint to roll back to"):
        found.roll_back(None)


def test_counts_and_losses_are_restored():
    found, consensus = rollback(9)
    found.record_step(0)
    consensus.spikes.add(3.0)
    other, its = rollback(9)
    other.load_state_dict(found.state_dict())
    assert other.counts == found.counts
    assert list(its.spikes.losses) == list(consensus.spikes.losses)
    other.load_state_dict({})  # of a checkpoint without them
    assert other.counts["skipped_steps"] == 0
