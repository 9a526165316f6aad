"""Speed and peak memory of each rank, gathered with the lines of metrics."""

import resource
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

STRAGGLER_RATIO, NUM_READINGS = 1.5, 3
"""A rank is reported if its forward pass takes so many times its peers' in so many consecutive readings."""


class StragglerMonitor:
    """Times this rank since the last reading, and gathers the times of all ranks in a reading.

    Ranks wait for each other, so a step takes equally long on all of them. They differ in the forward pass of
    their own layers and in the wait for data. With tensor parallelism or ZeRO 3 a forward pass waits for
    other ranks, so a whole group is slow together.

    stage: the module of this rank's layers. hosts: of all ranks. num_stages: pipeline stages; a rank is
    compared with those of its stage.
    """

    def __init__(self, stage: nn.Module, device: torch.device, hosts: list[str], num_stages: int):
        self._hosts, self._num_stages, self._device = hosts, num_stages, device
        self._on_gpu = device.type == "cuda"
        self._data_seconds = 0.0
        self._begins: list[Any] = []  # of forward passes, as _now() gives them
        self._ends: list[Any] = []
        self._num_steps, self._since = 0, time.monotonic()
        self._slow_rank, self._times_slow = -1, 0
        stage.register_forward_pre_hook(lambda *_: self._begins.append(self._now()))
        stage.register_forward_hook(lambda *_: self._ends.append(self._now()))

    def _now(self) -> Any:
        """Seconds, or an event in the GPU's stream."""
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Time the block that fetches a step's batch."""
        began = time.perf_counter()
        yield
        self._data_seconds += time.perf_counter() - began
        self._num_steps += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time nothing of the block, whose forward passes are not training's."""
        began, begins, ends = time.monotonic(), self._begins, self._ends
        self._begins, self._ends = [], []
        yield
        self._begins, self._ends = begins, ends
        self._since += time.monotonic() - began

    def read(self) -> tuple[dict[str, float], str | None]:
        """Figures of a line of metrics, and a warning about a straggler. Called by every rank.

        step_seconds, of all; forward_seconds, the median rank's; data_seconds, the longest wait; slowest_rank
        and slowest_ratio to the median of its stage; host_memory_bytes and device_memory_bytes, the peak of
        any rank, and memory_bytes, the device's if there is one, else the host's.
        """
        steps = max(1, self._num_steps)
        forward = sum(
            begin.elapsed_time(end) / 1e3 if self._on_gpu else end - begin
            for begin, end in zip(self._begins, self._ends, strict=True)
        )
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        device = torch.cuda.max_memory_allocated() if self._on_gpu else 0
        figures_of_rank = [forward / steps, self._data_seconds / steps, float(host), float(device)]
        own = torch.tensor(figures_of_rank, dtype=torch.float64, device=self._device)
        everyone = [torch.zeros_like(own) for _ in self._hosts]
        dist.all_gather(everyone, own)
        forwards, data, hosts, devices = torch.stack(everyone).T.tolist()
        now = time.monotonic()  # after the gather: the time includes the steps of every rank
        rank, ratio = self._slowest(forwards)
        figures = {
            "step_seconds": (now - self._since) / steps,
            "forward_seconds": statistics.median(forwards),
            "data_seconds": max(data),
            "slowest_rank": rank,
            "slowest_ratio": ratio,
            "memory_bytes": int(max(devices) or max(hosts)),
            "host_memory_bytes": int(max(hosts)),
            "device_memory_bytes": int(max(devices)),
        }
        self._begins, self._ends, self._data_seconds = [], [], 0.0
        self._num_steps, self._since = 0, now
        return figures, self._warning(rank, ratio)

    def _slowest(self, forwards: list[float]) -> tuple[int, float]:
        """The slowest rank relative to its stage's median, and that ratio: stages have different layers."""
        size = len(forwards) // self._num_stages  # ranks of a stage are consecutive
        medians = [statistics.median(forwards[i : i + size]) for i in range(0, len(forwards), size)]
        ratios = [own / (medians[rank // size] or 1.0) for rank, own in enumerate(forwards)]
        slowest = max(range(len(ratios)), key=ratios.__getitem__)
        return slowest, ratios[slowest]

    def _warning(self, rank: int, ratio: float) -> str | None:
        is_same = rank == self._slow_rank
        self._times_slow = (self._times_slow * is_same + 1) if ratio > STRAGGLER_RATIO else 0
        self._slow_rank = rank
        if self._times_slow != NUM_READINGS:
            return None
        return (
            f"rank {rank} on {self._hosts[rank]} is a straggler: its forward pass takes {ratio:.1f} times as "
            "long as its peers'"
        )
