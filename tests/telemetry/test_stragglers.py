"""Stragglers and peak memory, gathered from all ranks."""

import time

import pytest
import torch
import torch.distributed as dist
from torch import nn

from megafusion.telemetry.peak_flops import peak_flops
from megafusion.telemetry.stragglers import StragglerMonitor
from tests.support.workers import run_workers


class Layers(nn.Module):
    """Layers whose forward pass is slower on rank 1."""

    def forward(self) -> None:
        time.sleep(0.02 if dist.get_rank() == 1 else 0.005)


def readings() -> list[tuple[dict, str | None]]:
    layers = Layers()
    monitor = StragglerMonitor(layers, torch.device("cpu"), ["alpha", "beta", "gamma"], num_stages=1)
    found = []
    for _ in range(4):
        for _ in range(3):
            with monitor.waiting_for_data():
                time.sleep(0.01 if dist.get_rank() == 2 else 0)
            layers()
        found.append(monitor.read())
    return found


def test_a_straggler_is_named_with_its_host():
    everyone = run_workers(readings, 3)
    assert [figures["slowest_rank"] for figures, _ in everyone[0]] == [1] * 4
    for figures, _ in everyone[0]:
        assert figures["slowest_ratio"] > 1.5
        assert 0.01 <= figures["data_seconds"] < 0.1
        assert figures["forward_seconds"] < figures["step_seconds"]
        assert figures["memory_bytes"] == figures["host_memory_bytes"] > 1e7
        assert figures["device_memory_bytes"] == 0
    warnings = [warning for _, warning in everyone[0]]
    assert warnings[:2] == [None, None]
    assert "rank 1 on beta is a straggler" in warnings[2]
    assert warnings[3] is None  # only once
    names = ("slowest_rank", "slowest_ratio")
    assert [[f[n] for n in names] for f, _ in everyone[0]] == [[f[n] for n in names] for f, _ in everyone[2]]


@pytest.mark.parametrize(("num_stages", "slowest"), [(1, 3), (2, 1)])
def test_ranks_are_compared_within_their_stage(num_stages, slowest):
    monitor = object.__new__(StragglerMonitor)
    monitor._num_stages = num_stages
    assert monitor._slowest([1.0, 1.3, 4.0, 4.1])[0] == slowest


def test_an_unknown_chip_has_no_peak(monkeypatch):
    assert peak_flops("bf16") is None or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    names = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA T4": None}
    for name, peak in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda name=name: name)
        assert peak_flops("bf16") == peak
        assert peak_flops("fp32") is None
