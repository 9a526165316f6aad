"""What an exception says: whether a peer is gone, and that in one line."""

import re

import torch.distributed as dist

from megafusion.errors import UserError

# What gloo, NCCL and the store say when a peer is gone, as opposed to wrong arguments of a collective.
_LOST = re.compile(
    r"gloo/transport|connection (was |likely )*(closed|reset|refused)|broken pipe", re.IGNORECASE
)
_BACKEND_ERRORS = (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError)


def is_lost(error: BaseException) -> bool:
    """Whether an exception, or what it came from, says that a peer of a collective does not answer."""
    if isinstance(error, UserError):
        return False
    if isinstance(error, _BACKEND_ERRORS) or (isinstance(error, RuntimeError) and _LOST.search(str(error))):
        return True
    return error.__cause__ is not None and is_lost(error.__cause__)


def describe(error: BaseException) -> str:
    """Class and first line of an exception, without what gloo says of itself: ranks are to say the same."""
    lines = str(error).strip().splitlines() or [""]
    text = re.sub(r"^\[\S*gloo/\S*\] ", "", lines[0])
    text = re.sub(r" \[[\w.:]+\]:\d+\b.*| for (send|recv) operation to complete", "", text)
    return f"{type(error).__name__}: {text[:300]}"
