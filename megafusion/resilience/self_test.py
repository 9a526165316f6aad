"""Start-up self-test of every rank, so that a bad node is named before its results are used."""

import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist

from megafusion.errors import ExitStatus, UserError
from megafusion.resilience.watchdog.failures import format_ranks

DISK_BYTES = 1 << 16


def self_test(folder: Path, device: torch.device, wants_stop: bool) -> tuple[list[str], bool]:
    """Test collectives, a matrix product and a write into the run folder, on all ranks at once.

    Returns the ranks' hosts, and whether any rank was asked to stop meanwhile. Raises UserError (FAILED) on
    every rank, naming the ranks that failed, their hosts and the failures. The watchdog handles a collective
    that hangs.
    """
    own = [*_test_collectives(device), *_test_matrix_product(device), *_test_disk(folder)]
    results: list = [None] * dist.get_world_size()
    dist.all_gather_object(results, (socket.gethostname(), own, wants_stop))
    bad: dict[tuple[str, str], list[int]] = {}
    for rank, (host, failures, _) in enumerate(results):
        for failure in failures:
            bad.setdefault((host, failure), []).append(rank)
    if bad:
        lines = [f"{format_ranks(ranks)} on {host}: {failure}" for (host, failure), ranks in bad.items()]
        message = "\n  ".join(["start-up self-test failed; repair or exclude the node:", *lines])
        raise UserError(message, on_every_rank=True, exit_status=ExitStatus.FAILED)
    hosts, _, wanted = zip(*results, strict=True)
    return list(hosts), any(wanted)


def _test_collectives(device: torch.device) -> Iterator[str]:
    rank, world = dist.get_rank(), dist.get_world_size()
    numbers = torch.arange(4096, device=device) + rank
    dist.all_reduce(numbers)
    if not torch.equal(numbers.cpu(), torch.arange(4096) * world + world * (world - 1) // 2):
        yield "an all-reduce returned a wrong sum"
    gathered = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world)]
    dist.all_gather(gathered, torch.tensor([rank], device=device))
    if torch.cat(gathered).tolist() != list(range(world)):
        yield "an all-gather returned wrong values"


def _test_matrix_product(device: torch.device) -> Iterator[str]:
    """Multiply a(i, k) = (i + k) mod 5 by b(k, j) = (k x j) mod 7: integers, so the result is exact."""
    size = 2048 if device.type == "cuda" else 256
    i = torch.arange(size)
    a, b = (i[:, None] + i) % 5, (i[:, None] * i) % 7
    expected = a[:5] @ b  # in integers; the rows repeat after 5, as those of a do
    try:
        product = (a.to(device).float() @ b.to(device).float()).cpu()
    except RuntimeError as error:  # CUDA's error for a broken device
        yield f"a matrix product on {device} failed ({error})"
        return
    if not torch.equal(product.long(), expected[i % 5]):
        yield f"a matrix product on {device} is wrong"


def _test_disk(folder: Path) -> Iterator[str]:
    path = folder / f".self-test-{dist.get_rank()}"
    content = os.urandom(DISK_BYTES)
    try:
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if path.read_bytes() != content:
            yield f"{folder} returns other bytes than were written"
    except OSError as error:
        yield f"{folder} cannot be written ({error.strerror or error})"
    finally:
        with suppress(OSError):  # the failure has been reported
            path.unlink(missing_ok=True)
