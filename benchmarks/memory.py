"""How much memory a piece of work takes."""

from collections.abc import Callable
from pathlib import Path

import torch


def peak_growth(work: Callable[[], object]) -> int:
    """Bytes by which this process grows at the most in some work; on a GPU, the most that it allocates."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    work()
    return resident("VmHWM") - before


def resident(key: str) -> int:
    """Bytes of this process: VmRSS, or VmHWM at its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")
