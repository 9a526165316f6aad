"""The mask of a packed row as two integers a position.

In a packed sequence, the query at position i sees exactly one contiguous run of keys
[row_start(i), row_end(i)): it starts where its document starts, and ends at i + 1 for text and at the
image's end for a patch. Nothing else about the mask is ever stored or sent.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from megafusion.errors import UserError

if TYPE_CHECKING:
    from interval_attention import Prepared
    from interval_attention.flash import FlashPrepared


@dataclass(frozen=True)
class Intervals:
    """Keys visible to each query, made once a batch and shared by all layers.

    row_start, row_end: int32 [B, S]; the query at [b, i] sees keys row_start <= j < row_end, and none
    where the two are equal. num_keys: number of key positions; S in training, the cache's length in
    generation. may_be_empty: whether some row may see none; packed rows never do, and knowing so spares
    each layer the question.
    """

    row_start: Tensor
    row_end: Tensor
    num_keys: int
    may_be_empty: bool = False

    @cached_property
    def dense_mask(self) -> Tensor:
        """bool [B, 1, S, num_keys], True where visible: for the reference backend and for tests."""
        key = torch.arange(self.num_keys, device=self.row_start.device)
        return ((key >= self.row_start[..., None]) & (key < self.row_end[..., None]))[:, None]

    @cached_property
    def column_bounds(self) -> tuple[Tensor, Tensor]:
        """The transpose, also one interval a column: int32 [B, num_keys] first and last+1 query row.

        Needs row_start and row_end non-decreasing along S, as packing makes them.
        """
        key = torch.arange(self.num_keys, device=self.row_start.device, dtype=torch.int32)
        key = key.expand(self.row_start.shape[0], -1).contiguous()
        first = torch.searchsorted(self.row_end.contiguous(), key, right=True, out_int32=True)
        last = torch.searchsorted(self.row_start.contiguous(), key, right=True, out_int32=True)
        return first, last

    @cached_property
    def additive_mask(self) -> Tensor:
        """float [B, 1, S, num_keys]: 0 where visible, -inf elsewhere; rows that see nothing are all 0.

        An all -inf row would give NaN; `some_visible` zeroes those rows' output afterwards instead.
        """
        hidden = ~self.dense_mask & self.some_visible[:, None, :, None]
        return torch.zeros(hidden.shape, device=hidden.device).masked_fill_(hidden, float("-inf"))

    @cached_property
    def some_visible(self) -> Tensor:
        """bool [B, S]: whether the row sees any key."""
        return self.row_end > self.row_start

    @cached_property
    def block_mask(self) -> BlockMask:
        """The mask as FlexAttention wants it; making it looks at all S x num_keys pairs once a batch."""

        def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (key >= self.row_start[row, query]) & (key < self.row_end[row, query])

        num_rows, num_queries = self.row_start.shape
        return create_block_mask(
            sees, num_rows, None, num_queries, self.num_keys, device=self.row_start.device
        )

    @cached_property
    def prepared(self) -> "Prepared":
        """Column bounds and schedule for the Triton kernels."""
        from interval_attention import prepare

        return prepare(self.row_start, self.row_end, self.num_keys)

    @cached_property
    def flash_prepared(self) -> "FlashPrepared":
        """Block lists for flash-attention 4, or the documents' starts for flash-attention 2.

        UserError for rows with images where only flash-attention 2 is installed.
        """
        from interval_attention.flash import flash_package, flash_prepare

        try:
            package = flash_package(self.row_start.device)
            return flash_prepare(self.row_start, self.row_end, self.num_keys, package)
        except ValueError as error:
            raise UserError(f"model.attention: flash cannot serve ({error})") from error
