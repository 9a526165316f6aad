"""Ulysses sequence parallelism (arXiv 2309.14509) for long rows, through DeepSpeed's attention.

The ranks of a row hold a slice of its positions each, and all heads. In attention they exchange: each
holds all positions of its share of the heads, so that the mask of whole rows serves as it is.
"""

from typing import Any

import megafusion.device  # noqa: F401 - before deepspeed

import torch.distributed as dist
from deepspeed.sequence.layer import DistributedAttention
from torch import Tensor

from megafusion.model.transformer import Block
from megafusion.parallel import collectives
from megafusion.parallel.mesh import Mesh
from megafusion.parallel.tensor import POSITIONS

BATCH, HEADS = 0, 2  # dimensions of q_BSHK


def exchange_heads(block: Block, mesh: Mesh) -> None:
    """Let a block's attention exchange positions for heads before, and back after."""
    attend = DistributedAttention(block.attention.attend, mesh.group("ulysses"), HEADS, POSITIONS)

    def attention(q_BSHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, mask: Any) -> Tensor:
        return attend(q_BSHK, k_BSGK, v_BSGK, BATCH, None, mask)

    block.attention.attend = attention


class SequenceShard:
    """Positions of a row divided over the Ulysses ranks, in the order of their numbers."""

    def __init__(self, mesh: Mesh):
        self.group = mesh.group("ulysses")
        self.rank, self.num_ranks = dist.get_rank(self.group), dist.get_world_size(self.group)

    def take(self, x_BS: Tensor) -> Tensor:
        """This rank's positions of what every rank holds alike."""
        return x_BS.chunk(self.num_ranks, POSITIONS)[self.rank]

    def gather_or_copy(self, x_BSD: Tensor) -> Tensor:
        """All positions, from each rank's."""
        return x_BSD if self.num_ranks == 1 else collectives.gather(x_BSD, self.group, POSITIONS)

    def reduce_or_scatter(self, x_BSD: Tensor) -> Tensor:
        """This rank's positions of the sum over the ranks."""
        return x_BSD if self.num_ranks == 1 else collectives.scatter(x_BSD, self.group, POSITIONS)

    def total(self, nats: Tensor) -> Tensor:
        """A sum over positions, whole on every rank."""
        return nats if self.num_ranks == 1 else collectives.reduce(nats, self.group)
