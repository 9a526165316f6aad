"""Float32 gradients of ZeRO 1 and 2, reduced to the ranks that own them while backward still computes.

As in DeepSpeed, a group's parameters are flattened behind each other, and data rank r owns the r-th share of
the elements. A bucket is a part of one share, which is reduced to its owner; together they are a
reduce-scatter. Where shares are small, a group is one bucket. All ranks reduce the buckets in one order, near
that in which backward completes them.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET_SIZE = 2**25
"""Numbers of a share's bucket at most, 128 MiB: enough for the full speed of links, if a share has so many.
"""
SMALL_SHARE = 2**20
"""Numbers. A group of smaller shares is one bucket, reduced and scattered at once when backward has ended: a
reduction for each rank, one after the other, would be latency alone. So ZeRO 2 keeps it whole until then."""
MAX_IN_FLIGHT = 2
"""Buckets at once that have memory of their own, beside those that are being filled."""


class Group(NamedTuple):
    """Parameters that are updated together: their flattened weights, of which they are views, and order."""

    flat: Tensor
    parameters: Sequence[nn.Parameter]


class Bucket:
    """Elements [start, stop) of a group's flattened gradients: in the share of `owner`, or in all if None."""

    def __init__(self, group: int, start: int, stop: int, owner: int | None):
        self.group, self.start, self.stop, self.owner = group, start, stop, owner
        self.pieces: list[Piece] = []
        self.num_missing = 0
        """Pieces without their last gradient of this round."""
        self.sums: Tensor | None = None


class Piece(NamedTuple):
    """A part of a parameter in a bucket: its elements `own`, flattened, at `there` in the bucket."""

    bucket: Bucket
    parameter: int
    own: slice
    there: slice


class Buckets:
    """Sums of the gradients of a step, one float32 part a group: this rank's share, `parts`.

    Each gradient is added as it comes, in one kernel, and dropped; the first one of a round replaces the old
    sum, so that nothing is filled with zeros. A round, at whose end buckets are reduced, is a step with its
    num_micro_batches where every rank keeps `whole` sums (ZeRO 1: float32, one a group), and a micro-batch
    else (ZeRO 2), in which buckets have memory only until they are reduced.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        order: Sequence[nn.Parameter],
        process_group: dist.ProcessGroup,
        num_micro_batches: int,
        whole: list[Tensor] | None,
    ):
        """order: all parameters in the order in which forward uses them, or near it: a bucket waits for those
        that are expected before it, and keeps its memory meanwhile. A U-Net's are in its modules' order."""
        self._process_group = process_group
        self._rank, self._num_ranks = dist.get_rank(process_group), dist.get_world_size(process_group)
        self._gradients_a_round = num_micro_batches if whole else 1
        self._keeps_whole = whole is not None
        assert self._keeps_whole or self._num_ranks > 1, "one rank's share is whole"
        shares = [group.flat.numel() // self._num_ranks for group in groups]
        self._first = [self._rank * share for share in shares]
        if whole:
            self.parts = [w.narrow(0, a, n) for w, a, n in zip(whole, self._first, shares, strict=True)]
        else:
            self.parts = [
                torch.zeros(share, dtype=torch.float32, device=group.flat.device)
                for share, group in zip(shares, groups, strict=True)
            ]
        parameters = [parameter for group in groups for parameter in group.parameters]
        self._num_gradients = [0] * len(parameters)
        self._pieces: list[list[Piece]] = [[] for _ in parameters]
        buckets, number = [], 0
        for index, (group, share) in enumerate(zip(groups, shares, strict=True)):
            own = list(_buckets(index, share, self._num_ranks))
            for parameter in group.parameters:
                _add_pieces(own, number, parameter, group.flat)
                number += 1
            buckets += [bucket for bucket in own if bucket.pieces]
        if whole:
            for bucket in buckets:
                bucket.sums = whole[bucket.group][bucket.start : bucket.stop]
        for bucket in buckets:
            bucket.num_missing = len(bucket.pieces)
            for piece in bucket.pieces:
                self._pieces[piece.parameter].append(piece)
        # Backward comes last to the parameter that forward uses first.
        used = {id(parameter): position for position, parameter in enumerate(order)}
        position = [used[id(parameter)] for parameter in parameters]
        self._buckets = sorted(
            buckets, key=lambda b: min(position[p.parameter] for p in b.pieces), reverse=True
        )
        self._num_reduced = 0
        self._in_flight: deque[tuple[Bucket, Tensor, dist.Work]] = deque()
        self._has_sums: set[int] = set()
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(partial(self.add, number))
            for number, parameter in enumerate(parameters)
        ]

    def close(self) -> None:
        """Remove hooks."""
        for hook in self._hooks:
            hook.remove()

    def add(self, number: int, parameter: nn.Parameter) -> None:
        """Add a parameter's gradient, and drop it. Called in backward. number: among those of all groups."""
        assert parameter.grad is not None
        assert self._num_gradients[number] < self._gradients_a_round, "more gradients than micro-batches"
        gradient = parameter.grad.view(-1)
        for bucket, _, own, there in self._pieces[number]:
            sums = self._memory(bucket)[there]
            if self._num_gradients[number]:
                sums.add_(gradient[own])
            else:
                sums.copy_(gradient[own])
        parameter.grad = None
        self._num_gradients[number] += 1
        if self._num_gradients[number] == self._gradients_a_round:
            for piece in self._pieces[number]:
                piece.bucket.num_missing -= 1
            self._reduce_complete()

    def end_micro_batch(self) -> None:
        """Called after the backward pass of each micro-batch, where sums are not whole."""
        if not self._keeps_whole:
            self._end_round()

    def finish(self) -> list[Tensor]:
        """Mean gradients over data ranks: this rank's share of each group. Called once a step."""
        if self._keeps_whole:
            self._end_round()
        self._settle(0)
        self._has_sums.clear()
        if self._num_ranks > 1:
            torch._foreach_mul_(self.parts, 1.0 / self._num_ranks)
        return self.parts

    def _memory(self, bucket: Bucket) -> Tensor:
        if bucket.sums is None:
            size = bucket.stop - bucket.start
            num_filled = sum(piece.there.stop - piece.there.start for piece in bucket.pieces)
            make = torch.empty if num_filled == size else torch.zeros  # a group is padded at its end
            bucket.sums = make(size, dtype=torch.float32, device=self.parts[bucket.group].device)
        return bucket.sums

    def _reduce_complete(self) -> None:
        while self._num_reduced < len(self._buckets) and not self._buckets[self._num_reduced].num_missing:
            self._reduce(self._buckets[self._num_reduced])
            self._num_reduced += 1

    def _end_round(self) -> None:
        """Reduce the buckets that lack a gradient, which counts as zero, and begin another round."""
        for bucket in self._buckets[self._num_reduced :]:
            for piece in bucket.pieces:
                if not self._num_gradients[piece.parameter]:
                    self._memory(bucket)[piece.there].zero_()
            self._reduce(bucket)
        self._num_reduced = 0
        self._num_gradients = [0] * len(self._num_gradients)
        for bucket in self._buckets:
            bucket.num_missing = len(bucket.pieces)

    def _reduce(self, bucket: Bucket) -> None:
        """Begin to sum a bucket over data ranks. The host does not wait, on a GPU."""
        if self._num_ranks == 1:
            return
        sums, group = self._memory(bucket), self._process_group
        if bucket.owner is None:
            whole, sums = sums, sums.chunk(self._num_ranks)[self._rank]
            work = dist.reduce_scatter_tensor(sums, whole, group=group, async_op=True)
        else:
            work = dist.reduce(sums, group=group, group_dst=bucket.owner, async_op=True)
        assert work is not None
        self._in_flight.append((bucket, sums, work))
        if not self._keeps_whole:
            bucket.sums = None
            self._settle(MAX_IN_FLIGHT)

    def _settle(self, max_in_flight: int) -> None:
        """Make the device wait for the oldest buckets, and add this rank's to its part."""
        while len(self._in_flight) > max_in_flight:
            bucket, sums, work = self._in_flight.popleft()
            work.wait()
            if not self._keeps_whole and bucket.owner in (self._rank, None):
                start = max(0, bucket.start - self._first[bucket.group])
                part = self.parts[bucket.group][start : start + len(sums)]
                (part.add_ if id(bucket) in self._has_sums else part.copy_)(sums)
                self._has_sums.add(id(bucket))


def _buckets(group: int, share: int, num_ranks: int) -> Iterator[Bucket]:
    if share < SMALL_SHARE:
        yield Bucket(group, 0, share * num_ranks, None)
        return
    for owner in range(num_ranks):
        for start in range(owner * share, (owner + 1) * share, BUCKET_SIZE):
            yield Bucket(group, start, min(start + BUCKET_SIZE, (owner + 1) * share), owner)


def _add_pieces(buckets: Sequence[Bucket], number: int, parameter: nn.Parameter, flat: Tensor) -> None:
    """Add what the buckets of a group hold of one of its parameters."""
    offset = (parameter.data_ptr() - flat.data_ptr()) // flat.element_size()
    for bucket in buckets:
        start, stop = max(offset, bucket.start), min(offset + parameter.numel(), bucket.stop)
        if start < stop:
            own, there = (slice(start - first, stop - first) for first in (offset, bucket.start))
            bucket.pieces.append(Piece(bucket, number, own, there))
