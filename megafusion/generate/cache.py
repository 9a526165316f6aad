"""Key-value cache for rows of unequal length.

A row's keys fill the slots from 0 to its length. A forward pass writes to the slots behind them, and only
`advance` adds those to the row. So an image can be denoised in place, pass after pass; keys of padded
positions are never attended to, and the next pass overwrites them.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megafusion.model.config import ModelConfig
from megafusion.sequence.intervals import Intervals

MAX_GROWTH = 1024
"""Slots that a cache which is full gets at most, beyond those that it needs."""

KEYS_MULTIPLE = 16
"""A pass sees as many slots as its longest row fills, rounded up to a multiple, and caches have a multiple.

Then few shapes occur, and PyTorch's attention on CPUs gives equal bits, however many empty slots follow."""


def _round_up(slots: int) -> int:
    return -(-slots // KEYS_MULTIPLE) * KEYS_MULTIPLE


@dataclass
class _Layer:
    """One layer's keys and values [B, T, G, K], and the slots that the current pass writes and sees.

    slots: int64 [B x S], of all rows' slots one after another. num_keys: of the first slots, which it sees.
    """

    keys: Tensor
    values: Tensor
    slots: Tensor
    num_keys: int = 0

    def update(self, k_BSGK: Tensor, v_BSGK: Tensor) -> tuple[Tensor, Tensor]:
        self.keys.view(-1, *self.keys.shape[2:]).index_copy_(0, self.slots, k_BSGK.flatten(0, 1))
        self.values.view(-1, *self.values.shape[2:]).index_copy_(0, self.slots, v_BSGK.flatten(0, 1))
        return self.keys[:, : self.num_keys], self.values[:, : self.num_keys]


@dataclass
class KVCache:
    """Keys and values of B rows for all layers; lengths int64 [B] counts each row's cached positions.

    It grows when a pass needs more slots than `capacity`.
    """

    capacity: int
    lengths: Tensor
    layers: list[_Layer]

    @classmethod
    def empty(cls, num_rows: int, capacity: int, config: ModelConfig, like: Tensor) -> "KVCache":
        """An empty cache of at least `capacity` slots per row, on the device and in the dtype of `like`."""
        capacity = _round_up(capacity)
        size = (num_rows, capacity, config.kv_heads, config.head_size)
        no_slots = torch.zeros(0, dtype=torch.int64, device=like.device)
        layers = [
            _Layer(like.new_zeros(size), like.new_zeros(size), no_slots) for _ in range(config.num_layers)
        ]
        return cls(capacity, torch.zeros(num_rows, dtype=torch.int64, device=like.device), layers)

    def allocate(self, row_end_BS: Tensor, may_be_empty: bool) -> tuple[Tensor, Intervals]:
        """Allocate S slots per row behind its length, for the next pass.

        row_end_BS: exclusive end of each new position's visible keys, counted from the row's length (i + 1
        for the i-th text position; P for an image's patches). may_be_empty: whether it may be 0, for padding.
        Returns positions [B, S] and intervals.
        """
        length_B1, num_rows = self.lengths[:, None], len(self.lengths)
        positions = length_B1 + torch.arange(row_end_BS.shape[1], device=row_end_BS.device)
        end = length_B1 + row_end_BS
        needed = int(end.max()) + 1  # one more is for a row that is not read: it is written to, and not seen
        if needed > self.capacity:  # as many slots again, so that it happens seldom
            self._resize(_round_up(max(needed, min(2 * self.capacity, self.capacity + MAX_GROWTH))))
        if may_be_empty:
            end = torch.where(row_end_BS > 0, end, 0)
        first = torch.arange(0, num_rows * self.capacity, self.capacity, device=end.device)
        slots = (first[:, None] + positions).flatten()
        num_keys = _round_up(needed)
        for layer in self.layers:
            layer.slots, layer.num_keys = slots, num_keys
        return positions, Intervals(end.int(), None, num_keys, may_be_empty)

    def _resize(self, capacity: int) -> None:
        """Add slots until there are `capacity`."""
        self.capacity = capacity
        for layer in self.layers:
            layer.keys, layer.values = _padded(layer.keys, capacity), _padded(layer.values, capacity)

    def advance(self, counts_B: Tensor) -> None:
        """Add the first `counts` positions of the last pass to each row."""
        self.lengths = self.lengths + counts_B

    def select(self, rows: Tensor) -> "KVCache":
        """A copy of some rows, which may repeat."""
        # The slots of the last pass are dropped, here and below: the next one allocates its own.
        none = self.lengths.new_zeros(0)
        layers = [_Layer(each.keys[rows], each.values[rows], none) for each in self.layers]
        return KVCache(self.capacity, self.lengths[rows], layers)

    def assign(self, rows: Tensor, other: "KVCache") -> None:
        """Overwrite some rows with those of another cache."""
        self._resize(max(self.capacity, other.capacity))
        self.lengths[rows] = other.lengths
        for layer, source in zip(self.layers, other.layers, strict=True):
            layer.keys[rows, : other.capacity] = source.keys
            layer.values[rows, : other.capacity] = source.values

    def concatenate(self, other: "KVCache") -> "KVCache":
        """A copy of the rows of both, this cache's first."""
        capacity = max(self.capacity, other.capacity)
        layers = [
            _Layer(
                torch.cat([_padded(a.keys, capacity), _padded(b.keys, capacity)]),
                torch.cat([_padded(a.values, capacity), _padded(b.values, capacity)]),
                self.lengths.new_zeros(0),
            )
            for a, b in zip(self.layers, other.layers, strict=True)
        ]
        return KVCache(capacity, torch.cat([self.lengths, other.lengths]), layers)


def _padded(x_BTGK: Tensor, capacity: int) -> Tensor:
    """Keys or values with `capacity` slots, which are no fewer."""
    return (
        F.pad(x_BTGK, (0, 0, 0, 0, 0, capacity - x_BTGK.shape[1])) if x_BTGK.shape[1] < capacity else x_BTGK
    )
