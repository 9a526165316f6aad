"""Next-token loss on text and denoising loss on images, each a mean over the global batch."""

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

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
    alignment: Tensor
    """0 without it."""
    total: Tensor


class Head(Protocol):
    """The language head of a model, which holds the weights."""

    def __call__(self, hidden_ND: Tensor, labels_R: Tensor, index_R: Tensor, z_loss: float) -> Tensor:
        """Nats of the labels that count, summed; see `summed_nats`."""


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
    """

    def __init__(self, config: ObjectiveConfig, sizes: Sequence[Size] = ()):
        super().__init__()
        self.config = config
        self.noise_process: NoiseProcess = config.noise_process.build()
        # Integers, so that casting the module to bf16 does not round them.
        areas = torch.tensor([math.prod(size) for size in sizes], dtype=torch.int64)
        self.register_buffer("areas", areas, persistent=False)
        self.bounding_area = math.prod(bounding_size(sizes)) if sizes else 0

    def forward(
        self,
        head: Head,
        hidden_BSD: Tensor,
        images_BNCHW: Tensor,
        targets: Targets,
        alignment_BN: Tensor | None = None,
    ) -> Losses:
        """Losses of next tokens, from normalised hidden states, and of predictions [B, N, C, H, W] for every
        image slot. alignment_BN: errors of `Alignment`."""
        text = self.nats(head, hidden_BSD, targets) / targets.num_text_targets.clamp(min=1)
        image = self._image_errors(images_BNCHW, targets).sum() / targets.num_images.clamp(min=1)
        total, alignment = text + self.config.image_weight * image, torch.zeros_like(text)
        if self.config.alignment and alignment_BN is not None:
            errors_BN = torch.where(targets.has_loss, alignment_BN, 0)
            alignment = errors_BN.sum() / targets.num_images.clamp(min=1)
            total = total + self.config.alignment.weight * alignment
        return Losses(text, image, alignment, total)

    def aligns(self, block: int) -> bool:
        """Whether the outputs of a block, counted from 1, are aligned with features."""
        return self.config.alignment is not None and self.config.alignment.layer == block

    def nats(self, head: Head, hidden_BSD: Tensor, targets: Targets) -> Tensor:
        """Cross-entropy summed over the text targets, float32 []. The head reads their positions alone."""
        return head(
            hidden_BSD.flatten(0, 1),
            targets.labels.flatten()[targets.target_index],
            targets.target_index,
            self.config.z_loss,
        )

    def sums(self, head: Head, hidden_BSD: Tensor, images_BNCHW: Tensor, targets: Targets) -> Tensor:
        """Float64 [NUM_SUMS], to be added up over batches: nats and number of text targets; then, in ten
        equal ranges of an image's time t, the image losses and the number of images.
        """
        text = self.nats(head, hidden_BSD, targets), (targets.labels != IGNORED_LABEL).sum()
        bucket = (targets.t * NUM_TIME_BUCKETS).long().clamp(max=NUM_TIME_BUCKETS - 1)
        is_in_bucket = F.one_hot(bucket, NUM_TIME_BUCKETS).double() * targets.has_loss[..., None]
        errors = self._image_errors(images_BNCHW, targets)[..., None].double() * is_in_bucket
        images = errors.sum((0, 1)), is_in_bucket.sum((0, 1))
        return torch.cat([torch.stack([figure.double() for figure in text]), *images])

    def _image_errors(self, images_BNCHW: Tensor, targets: Targets) -> Tensor:
        """The loss [B, N] of each image; 0 in slots without one."""
        target = self.noise_process.target(targets.latents, targets.noise, targets.t)
        share = None
        if len(self.areas) > 1:
            sizes_BN = targets.image_size.to(self.areas.device, non_blocking=True)
            share = self.areas[sizes_BN] / self.bounding_area
        weight = self.noise_process.loss_weight(targets.t)
        return squared_errors(images_BNCHW, target, targets.has_loss, share, weight)
