"""Ulysses sequence parallelism (arXiv 2309.14509) for long rows, through DeepSpeed's attention.

The ranks of a row hold a slice of its positions each, and all heads. Around attention, all-to-alls exchange
positions for heads: each rank then holds all positions of its heads, so the mask of whole rows applies.
"""

from collections.abc import Callable
from typing import Any

import megafusion.device  # noqa: F401 - before deepspeed

import torch.distributed as dist
from deepspeed.sequence.layer import DistributedAttention
from torch import Tensor

from megafusion.objective.losses import CrossEntropy
from megafusion.parallel import collectives
from megafusion.parallel.tensor import POSITIONS

BATCH, HEADS = 0, 2  # dimensions of q_BSHK
Attend = Callable[[Tensor, Tensor, Tensor, Any], Tensor]  # a backend's `attend`


def ulysses_attention(attend: Attend, group: dist.ProcessGroup) -> Attend:
    """An attention backend between two exchanges: positions for heads, and back."""
    attention = DistributedAttention(attend, group, HEADS, POSITIONS)
    return lambda q_BSHK, k_BSGK, v_BSGK, mask: attention(q_BSHK, k_BSGK, v_BSGK, BATCH, None, mask)


class SequenceShard:
    """Positions of a row sharded over the Ulysses ranks, in the order of ranks."""

    def __init__(self, group: dist.ProcessGroup):
        self.group, self.rank, self.num_ranks = group, dist.get_rank(group), dist.get_world_size(group)

    def shard(self, x_BS: Tensor) -> Tensor:
        """This rank's positions of a tensor that every rank holds."""
        return x_BS.chunk(self.num_ranks, POSITIONS)[self.rank]

    def all_gather(self, x_BSD: Tensor) -> Tensor:
        """All positions from every rank's."""
        return x_BSD if self.num_ranks == 1 else collectives.all_gather(x_BSD, self.group, POSITIONS)

    def reduce_scatter(self, x_BSD: Tensor) -> Tensor:
        """This rank's positions of the sum over ranks."""
        return x_BSD if self.num_ranks == 1 else collectives.reduce_scatter(x_BSD, self.group, POSITIONS)


class SequenceParallelCrossEntropy:
    """Cross-entropy of logits of this rank's positions, summed over the ranks of a row."""

    def __init__(self, cross_entropy: CrossEntropy, sequence_shard: SequenceShard):
        self.cross_entropy, self.sequence_shard = cross_entropy, sequence_shard

    def __call__(self, logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
        """Nats summed over the labels that count; labels of all positions."""
        nats = self.cross_entropy(logits_BSV, self.sequence_shard.shard(labels_BS))
        return collectives.all_reduce(nats, self.sequence_shard.group)
