"""Errors of one rank that every rank raises."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from megafusion.errors import UserError


@contextmanager
def raise_on_all_ranks(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """What one rank of a group refuses in this block, every rank refuses with its error: none waits."""
    refused = None
    try:
        yield
    except UserError as error:
        refused = error
    answers: list[UserError | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(answers, refused, group)
    if found := next(filter(None, answers), None):
        found.on_every_rank = dist.get_world_size(group) == dist.get_world_size()
        raise found
