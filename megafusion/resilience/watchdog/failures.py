"""Classification of exceptions: whether a peer is lost."""

import re

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
