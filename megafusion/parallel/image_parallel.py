"""Images of a micro-batch divided over the ranks that share its rows, instead of computed by all of them.

Rank r runs the adapters for slots [r k, (r + 1) k) of the B x N image slots, with k rounded up: the last
rank may repeat the last slot, and what it makes of that is dropped.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from megafusion.model.adapters import Skips
from megafusion.model.transfusion import Stem, Tail
from megafusion.parallel import collectives


class ImageShard:
    """Which image slots a rank of the group computes."""

    def __init__(self, group: dist.ProcessGroup):
        self.group, self.rank, self.num_ranks = group, dist.get_rank(group), dist.get_world_size(group)

    def take(self, x: Tensor) -> Tensor:
        """This rank's k of N slots."""
        per_rank = self.num_own(x.shape[0])
        slots = torch.arange(self.rank * per_rank, (self.rank + 1) * per_rank, device=x.device)
        return x[slots.clamp(max=x.shape[0] - 1)]

    def put(self, own: Tensor, num_slots: int) -> Tensor:
        """All N slots: this rank's where they belong, zeros for the others'."""
        before = min(self.rank * own.shape[0], num_slots)
        kept = own[: num_slots - before]
        after = num_slots - before - kept.shape[0]
        return torch.cat([own.new_zeros(before, *own.shape[1:]), kept, own.new_zeros(after, *own.shape[1:])])

    def num_own(self, num_slots: int) -> int:
        """Slots that each rank computes."""
        return -(-num_slots // self.num_ranks)

    def collect(self, own: Tensor, num_slots: int) -> Tensor:
        """All N slots from all ranks."""
        return collectives.collect(own, self.group)[:num_slots]


def shard_images(stem: Stem | None, tail: Tail | None, own: ImageShard) -> None:
    """Let the adapters of a stage run on this rank's images alone.

    Only what stem and tail do with the adapters is wrapped, so that their parameters keep their names.
    """
    if stem is not None:
        stem.patches = partial(_down, stem.patches, own)
    if tail is not None:
        tail.predict = partial(_up, tail.predict, own)


def _down(
    patches: Callable, own: ImageShard, latents_NCHW: Tensor, timesteps_N: Tensor, sizes_N: Tensor
) -> tuple[Tensor, Skips]:
    """Patches [N, P, D], zeros for the others' images, to be summed; and the skips of this rank's."""
    made, skips = patches(own.take(latents_NCHW), own.take(timesteps_N), own.take(sizes_N))
    return own.put(made, latents_NCHW.shape[0]), skips


def _up(
    predict: Callable,
    own: ImageShard,
    hidden_NPD: Tensor,
    timesteps_N: Tensor,
    skips: Skips,
    sizes_N: Tensor,
) -> Tensor:
    """Predictions [N, C, H, W] of all images on every rank, from the skips of this rank's."""
    images = predict(own.take(hidden_NPD), own.take(timesteps_N), skips, own.take(sizes_N))
    return own.collect(images, hidden_NPD.shape[0])
