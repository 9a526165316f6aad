"""The attention mask of a packed row as two integers per position: one of a query, one of a key.

The query at position i sees the key at position j where j < row_end(i) and i < last_query(j). row_end is
i + 1 for text, and the end of its image for a patch; last_query is the end of the key's document. No other
form of the mask is stored or sent; each attention backend derives its own once a batch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Intervals:
    """Keys visible to each query.

    row_end int32 [B, S], last_query int32 [B, T]: the query at [b, i] sees key j where j < row_end[b, i] and
    i < last_query[b, j]; last_query is None where it hides no key, as in generation. num_keys: number T of
    key positions; S in training, slots of the cache in generation. may_be_empty: whether row_end may be 0,
    that of a fully masked query, as padding in generation; without it a layer saves a multiplication.
    has_holes: whether last_query may fall within a document, so that a query's keys are two intervals.
    """

    row_end: Tensor
    last_query: Tensor | None
    num_keys: int
    may_be_empty: bool = False
    has_holes: bool = False

    @property
    def dense_mask(self) -> Tensor:
        """bool [B, 1, S, T], True where visible."""
        key = torch.arange(self.num_keys, device=self.row_end.device)
        is_before = (key < self.row_end[..., None])[:, None]
        if self.last_query is None:
            return is_before
        query = torch.arange(self.row_end.shape[1], device=self.row_end.device)
        return is_before & (query[:, None] < self.last_query[:, None])[:, None]

    @property
    def not_empty(self) -> Tensor:
        """bool [B, S], False for a fully masked query."""
        return self.row_end > 0
