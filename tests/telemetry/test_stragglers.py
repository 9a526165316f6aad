"""Stragglers and peak memory, gathered from all ranks."""

import time

import pytest
import torch
import torch.distributed as dist
from torch import nn

from megafusion.telemetry.stragglers import StragglerMonitor
from megafusion.telemetry.throughput import peak_flops
from tests.support.workers import run_workers

FORWARD, DATA, STRAGGLER = 0.001, 0.01, 0.06
"""Seconds of a forward pass, of the last rank's wait for data, of rank 1's forward pass. Only a rank that
wakes up 0.04 s late in two steps running could hide the straggler."""


class Layers(nn.Module):
    """Layers whose forward pass is slower on rank 1."""

    def forward(self) -> None:
        time.sleep(STRAGGLER if dist.get_rank() == 1 else FORWARD)


def readings(num_steps: int) -> tuple[list[tuple[dict, str | None]], float]:
    """Four readings, and the seconds that they took."""
    layers, hosts = Layers(), ["alpha", "beta", "gamma"][: dist.get_world_size()]
    began = time.monotonic()
    monitor = StragglerMonitor(layers, torch.device("cpu"), hosts, num_stages=1)
    found = []
    for _ in range(4):
        for _ in range(num_steps):
            with monitor.waiting_for_data():
                time.sleep(DATA if dist.get_rank() == len(hosts) - 1 else 0)
            layers()
        found.append(monitor.read())
    return found, time.monotonic() - began


def test_a_step_is_its_forward_pass_its_wait_for_data_and_more():
    """On one rank, where no time is another's, so that the order of the figures does not depend on luck."""
    (found, seconds), num_steps = run_workers(readings, 1, 3)[0], 3
    for figures, _ in found:
        assert figures["forward_seconds"] >= FORWARD
        assert figures["data_seconds"] >= DATA
        assert figures["forward_seconds"] + figures["data_seconds"] < figures["step_seconds"]
    assert num_steps * sum(figures["step_seconds"] for figures, _ in found) <= seconds


def test_a_straggler_is_named_with_its_host():
    everyone = [found for found, _ in run_workers(readings, 3, 2)]
    assert [figures["slowest_rank"] for figures, _ in everyone[0]] == [1] * 4
    for number, (figures, _) in enumerate(everyone[0]):
        assert figures["slowest_ratio"] > 1.5
        assert figures["data_seconds"] >= DATA
        # The median rank's forward passes are part of its own steps, which no other rank's need contain.
        longest = max(found[number][0]["step_seconds"] for found in everyone)
        assert FORWARD <= figures["forward_seconds"] < longest
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
