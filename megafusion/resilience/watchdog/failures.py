"""Failures: whether a peer is lost, and exceptions and ranks as text."""

import re
from collections.abc import Iterable

import torch.distributed as dist

from megafusion.errors import UserError

# Messages of gloo, NCCL and the store about a lost peer, unlike those about wrong arguments of a collective.
_LOST = re.compile(
    r"gloo/transport|connection (was |likely )*(closed|reset|refused)|broken pipe", re.IGNORECASE
)
_BACKEND_ERRORS = (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError)


def is_lost(error: BaseException) -> bool:
    """Whether an exception, or one of its causes, means that a peer of a collective does not answer."""
    if isinstance(error, UserError):
        return False
    if isinstance(error, _BACKEND_ERRORS) or (isinstance(error, RuntimeError) and _LOST.search(str(error))):
        return True
    return error.__cause__ is not None and is_lost(error.__cause__)


def describe(error: BaseException) -> str:
    """Class and first line of an exception, without gloo's addresses, so that ranks report the same text."""
    lines = str(error).strip().splitlines() or [""]
    text = re.sub(r"^\[\S*gloo/\S*\] ", "", lines[0])
    text = re.sub(r" \[[\w.:]+\]:\d+\b.*| for (send|recv) operation to complete", "", text)
    return f"{type(error).__name__}: {text[:300]}"


def format_ranks(ranks: Iterable[int]) -> str:
    """ "rank 3" or "ranks 0-2, 5"."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    text = ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in spans)
    return f"rank{'s' if len(spans) > 1 or spans[0][0] != spans[0][1] else ''} {text}"
