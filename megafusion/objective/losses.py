"""Next-token loss on text and denoising loss on images, each a mean over the global batch."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megafusion.images.sizes import Size, bounding_size
from megafusion.objective.config import ObjectiveConfig
from megafusion.objective.noise_process import NoiseProcess
from megafusion.sequence.document import IGNORED_LABEL
from megafusion.sequence.packing import Targets


class Losses(NamedTuple):
    """Shares of the global means: their sum over micro-batches and ranks is the mean."""

    text: Tensor
    image: Tensor
    total: Tensor


CrossEntropy = Callable[[Tensor, Tensor], Tensor]
"""Nats summed over the labels that count, of logits [B, S, V] and labels [B, S]."""


def cross_entropy(logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
    """Cross-entropy in nats, summed over positions with a label."""
    return F.cross_entropy(
        logits_BSV.float().flatten(0, 1), labels_BS.flatten(), ignore_index=IGNORED_LABEL, reduction="sum"
    )


NUM_TIME_BUCKETS = 10
NUM_SUMS = 2 + 2 * NUM_TIME_BUCKETS
"""Length of `Objective.sums`."""


def squared_errors(
    prediction_BNCHW: Tensor,
    target_BNCHW: Tensor,
    used_BN: Tensor,
    share_BN: Tensor | None = None,
    weight_BN: Tensor | None = None,
) -> Tensor:
    """Mean squared error [B, N] of each image, times its weight; 0 in slots that are not used.

    share_BN: fraction of C x H x W that each image fills; the rest is zero in prediction and target.
    """
    error_BN = (prediction_BNCHW.float() - target_BNCHW).square().mean(dim=(2, 3, 4))
    if share_BN is not None:
        error_BN = error_BN / share_BN
    if weight_BN is not None:
        error_BN = error_BN * weight_BN
    return torch.where(used_BN, error_BN, 0)


class Objective(nn.Module):
    """Both losses, added so that backward runs once. It has no parameters.

    sizes: heights and widths of latents; with several, each image's loss is the mean over its own elements.
    cross_entropy: replaced where logits are sharded over the vocabulary or the sequence.
    """

    def __init__(
        self,
        config: ObjectiveConfig,
        sizes: Sequence[Size] = (),
        cross_entropy: CrossEntropy = cross_entropy,
    ):
        super().__init__()
        self.config = config
        self.noise_process: NoiseProcess = config.noise_process.build()
        self.cross_entropy = cross_entropy
        # Integers, so that casting the module to bf16 does not round them.
        areas = torch.tensor([math.prod(size) for size in sizes], dtype=torch.int64)
        self.register_buffer("areas", areas, persistent=False)
        self.bounding_area = math.prod(bounding_size(sizes)) if sizes else 0

    def forward(self, logits_BSV: Tensor, images_BNCHW: Tensor, targets: Targets) -> Losses:
        """Losses of next-token logits and of predictions [B, N, C, H, W] for every image slot."""
        text = self.cross_entropy(logits_BSV, targets.labels) / targets.num_text_targets.clamp(min=1)
        image = self._image_errors(images_BNCHW, targets).sum() / targets.num_images.clamp(min=1)
        return Losses(text, image, text + self.config.image_weight * image)

    def sums(self, logits_BSV: Tensor, images_BNCHW: Tensor, targets: Targets) -> Tensor:
        """Float64 [NUM_SUMS], to be added up over batches: nats and number of text targets; then, in ten
        equal ranges of an image's time t, the image losses and the number of images.
        """
        text = self.cross_entropy(logits_BSV, targets.labels), (targets.labels != IGNORED_LABEL).sum()
        bucket = (targets.t * NUM_TIME_BUCKETS).long().clamp(max=NUM_TIME_BUCKETS - 1)
        is_in_bucket = F.one_hot(bucket, NUM_TIME_BUCKETS).double() * targets.has_loss[..., None]
        errors = self._image_errors(images_BNCHW, targets)[..., None].double() * is_in_bucket
        images = errors.sum((0, 1)), is_in_bucket.sum((0, 1))
        return torch.cat([torch.stack([figure.double() for figure in text]), *images])

    def _image_errors(self, images_BNCHW: Tensor, targets: Targets) -> Tensor:
        """The loss [B, N] of each image; 0 in slots without one."""
        target = self.noise_process.target(targets.latents, targets.noise, targets.t)
        share = self.areas[targets.image_size] / self.bounding_area if len(self.areas) > 1 else None
        weight = self.noise_process.loss_weight(targets.t)
        return squared_errors(images_BNCHW, target, targets.has_loss, share, weight)
