"""The process group of a run."""

import torch
import torch.distributed as dist

from megafusion.engine.process_group import process_group
from tests.support.workers import run_workers


def timeouts_of_groups() -> list[float]:
    """Seconds of the whole group and of one within it."""
    dist.destroy_process_group()
    with process_group(7260.0):
        groups = [dist.group.WORLD, dist.new_group([0], backend="gloo")]
        backends = [group._get_backend(torch.device("cpu")) for group in groups]
        return [backend.options._timeout.total_seconds() for backend in backends]


def test_a_group_within_the_group_waits_as_long():
    assert run_workers(timeouts_of_groups, 1) == [[7260.0, 7260.0]]
