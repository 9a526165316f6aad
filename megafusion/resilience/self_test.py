"""What every rank tries before a run begins, so that a bad node is named and not found out by its losses."""

import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from megafusion.errors import UserError
from megafusion.resilience.watchdog.report import ranks_in_words

DISK_BYTES = 1 << 16


class _Answer(NamedTuple):
    host: str
    failures: list[str]
    wants_stop: bool


def self_test(folder: Path, device: torch.device, wants_stop: bool) -> tuple[list[str], bool]:
    """Collectives, a matrix product and a write into the run folder, by every rank at once.

    Returns the ranks' hosts, and whether any rank was asked to stop meanwhile. Raises UserError (status 1) on
    every rank, naming the ranks, their hosts and what failed. A collective that hangs is the watchdog's.
    """
    failures = [*_collectives(device), *_matrix_product(device), *_disk(folder)]
    answers: list = [None] * dist.get_world_size()
    dist.all_gather_object(answers, _Answer(socket.gethostname(), failures, wants_stop))
    bad: dict[tuple[str, str], list[int]] = {}
    for rank, answer in enumerate(answers):
        for failure in answer.failures:
            bad.setdefault((answer.host, failure), []).append(rank)
    if bad:
        lines = [f"{ranks_in_words(ranks)} on {host}: {failure}" for (host, failure), ranks in bad.items()]
        error = UserError("\n  ".join(["start-up self-test failed; leave the node out or mend it:", *lines]))
        error.on_every_rank, error.exit_status = True, 1
        raise error
    return [answer.host for answer in answers], any(answer.wants_stop for answer in answers)


def _collectives(device: torch.device) -> Iterator[str]:
    rank, world = dist.get_rank(), dist.get_world_size()
    numbers = torch.arange(4096, device=device) + rank
    dist.all_reduce(numbers)
    if not torch.equal(numbers.cpu(), torch.arange(4096) * world + world * (world - 1) // 2):
        yield "an all-reduce gave a wrong sum"
    gathered = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world)]
    dist.all_gather(gathered, torch.tensor([rank], device=device))
    if torch.cat(gathered).tolist() != list(range(world)):
        yield "an all-gather gave wrong values"


def _matrix_product(device: torch.device) -> Iterator[str]:
    """The product of a(i, k) = (i + k) mod 5 and b(k, j) = (k x j) mod 7: whole numbers, so exact."""
    size = 2048 if device.type == "cuda" else 256
    i = torch.arange(size)
    a, b = (i[:, None] + i) % 5, (i[:, None] * i) % 7
    known = a[:5] @ b  # in whole numbers; rows repeat after 5, as those of a do
    try:
        product = (a.to(device).float() @ b.to(device).float()).cpu()
    except RuntimeError as error:  # what CUDA says of a broken device
        yield f"a matrix product on {device} failed ({error})"
        return
    if not torch.equal(product.long(), known[i % 5]):
        yield f"a matrix product on {device} is wrong"


def _disk(folder: Path) -> Iterator[str]:
    path = folder / f".self-test-{dist.get_rank()}"
    content = os.urandom(DISK_BYTES)
    try:
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if path.read_bytes() != content:
            yield f"{folder} gives back other bytes than were written"
    except OSError as error:
        yield f"{folder} cannot be written ({error.strerror or error})"
    finally:
        with suppress(OSError):  # a disk that refuses has been named
            path.unlink(missing_ok=True)
