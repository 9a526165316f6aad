"""The attention mask of a packed row as two integers per position.

The query at position i sees one contiguous range of keys, [row_start(i), row_end(i)): from the start of its
document to i + 1 for text, and to the end of its image for a patch. No other form of the mask is stored or
sent; each attention backend derives its own once a batch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Intervals:
    """Keys visible to each query.

    row_start, row_end: int32 [B, S]; the query at [b, i] sees keys row_start <= j < row_end, and is fully
    masked if the two are equal. num_keys: number T of key positions; S in training, the cache's capacity in
    generation. may_be_empty: whether a query may be fully masked; never so in packed rows, which saves a
    multiplication per layer.
    """

    row_start: Tensor
    row_end: Tensor
    num_keys: int
    may_be_empty: bool = False

    @property
    def dense_mask(self) -> Tensor:
        """bool [B, 1, S, T], True where visible."""
        key = torch.arange(self.num_keys, device=self.row_start.device)
        return ((key >= self.row_start[..., None]) & (key < self.row_end[..., None]))[:, None]

    @property
    def not_empty(self) -> Tensor:
        """bool [B, S], False for a fully masked query."""
        return self.row_end > self.row_start
