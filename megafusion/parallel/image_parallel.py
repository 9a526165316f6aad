"""Image slots of a micro-batch sharded over the ranks that share its rows.

Rank r of R runs the adapters on slots [r k, (r + 1) k) of the B x N image slots, with k = ceil(B N / R).
A slot beyond the last repeats the last, and its result is dropped.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from megafusion.model.adapters import DownAdapter, Skips, UpAdapter
from megafusion.model.wrapper import Wrapper
from megafusion.objective.alignment import Alignment
from megafusion.parallel import collectives


class ImageShard:
    """The image slots of one rank of a group."""

    def __init__(self, group: dist.ProcessGroup):
        self.group, self.rank, self.num_ranks = group, dist.get_rank(group), dist.get_world_size(group)

    def num_local(self, num_slots: int) -> int:
        """Slots k that each rank computes."""
        return -(-num_slots // self.num_ranks)

    def shard(self, x: Tensor) -> Tensor:
        """This rank's k of N slots."""
        num_local = self.num_local(x.shape[0])
        slots = torch.arange(self.rank * num_local, (self.rank + 1) * num_local, device=x.device)
        return x[slots.clamp(max=x.shape[0] - 1)]

    def pad(self, local: Tensor, num_slots: int) -> Tensor:
        """[N, ...] with this rank's slots at their indices and zeros for the others'."""
        before, after = (len(local) * num_ranks for num_ranks in (self.rank, self.num_ranks - 1 - self.rank))
        return F.pad(local, [0, 0] * (local.ndim - 1) + [before, after])[:num_slots]

    def all_gather(self, local: Tensor, num_slots: int) -> Tensor:
        """[N, ...] from all ranks; each keeps the gradient of its own slots."""
        return collectives.all_gather_replicated(local, self.group)[:num_slots]


class ImageParallelDown(Wrapper):
    """A stem's adapter on this rank's images."""

    def __init__(self, adapter: DownAdapter, image_shard: ImageShard):
        super().__init__(adapter)
        self.image_shard = image_shard

    def forward(self, latents_NCHW: Tensor, timesteps_N: Tensor, sizes_N: Tensor) -> tuple[Tensor, Skips]:
        """Patches [N, P, D], zeros for the others' images, to be summed; skips of this rank's images."""
        local = (self.image_shard.shard(x) for x in (latents_NCHW, timesteps_N, sizes_N))
        patches, skips = self._wrapped_module(*local)
        return self.image_shard.pad(patches, latents_NCHW.shape[0]), skips


class ImageParallelAlignment(Wrapper):
    """The projection of alignment on this rank's images."""

    def __init__(self, alignment: Alignment, image_shard: ImageShard):
        super().__init__(alignment)
        self.image_shard = image_shard

    def forward(self, hidden_NPD: Tensor, features_NPF: Tensor) -> Tensor:
        """Errors [N] of all images on every rank."""
        local = map(self.image_shard.shard, (hidden_NPD, features_NPF))
        return self.image_shard.all_gather(self._wrapped_module(*local), len(hidden_NPD))


class ImageParallelUp(Wrapper):
    """A tail's adapter on this rank's images."""

    def __init__(self, adapter: UpAdapter, image_shard: ImageShard):
        super().__init__(adapter)
        self.image_shard = image_shard

    def forward(self, hidden_NPD: Tensor, timesteps_N: Tensor, skips: Skips, sizes_N: Tensor) -> Tensor:
        """Predictions [N, C, H, W] of all images on every rank, from the skips of this rank's images."""
        hidden, timesteps, sizes = (self.image_shard.shard(x) for x in (hidden_NPD, timesteps_N, sizes_N))
        images = self._wrapped_module(hidden, timesteps, skips, sizes)
        return self.image_shard.all_gather(images, hidden_NPD.shape[0])
