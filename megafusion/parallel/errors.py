"""Errors of one rank, raised on every rank."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from megafusion.errors import UserError


@contextmanager
def raise_on_all_ranks(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Re-raise on every rank the first UserError that any rank raises in the block: none is left waiting.

    group: all ranks by default. Every rank of the group must enter and leave the block.
    """
    raised = None
    try:
        yield
    except UserError as error:
        raised = error
    errors: list[UserError | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(errors, raised, group)
    if first := next(filter(None, errors), None):
        first.on_every_rank = dist.get_world_size(group) == dist.get_world_size()
        raise first
