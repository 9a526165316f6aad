"""Ulysses sequence parallelism (arXiv 2309.14509) for long rows, through DeepSpeed's attention.

The ranks of a row hold a slice of its positions each, and all heads. Around attention, all-to-alls exchange
positions for heads: each rank then holds all positions of its heads, so the mask of whole rows applies.
"""

from collections.abc import Callable, Sequence
from typing import Any

import megafusion.device  # noqa: F401 - before deepspeed

import torch.distributed as dist
from deepspeed.sequence.layer import DistributedAttention
from torch import Tensor

from megafusion.images.sizes import Size
from megafusion.objective.config import ObjectiveConfig
from megafusion.objective.losses import Head, Objective
from megafusion.parallel import collectives
from megafusion.parallel.tensor import POSITIONS
from megafusion.sequence.packing import Targets

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


class SequenceParallelObjective(Objective):
    """The losses of a row that Ulysses ranks share: each computes a share of the text targets."""

    def __init__(self, config: ObjectiveConfig, sizes: Sequence[Size], group: dist.ProcessGroup):
        super().__init__(config, sizes)
        self.group = group

    def nats(self, head: Head, hidden_BSD: Tensor, targets: Targets) -> Tensor:
        """Summed over the ranks, in float32 []; each keeps the gradient of its share."""
        share = targets.target_index.tensor_split(self.group.size())[dist.get_rank(self.group)]
        nats = super().nats(head, hidden_BSD, targets._replace(target_index=share))
        return collectives.all_reduce(nats, self.group)
