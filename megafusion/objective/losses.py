"""Next-token loss on text, denoising loss on images, each a mean over the whole global batch."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from megafusion.config import Config
from megafusion.objective.schedule import ScheduleConfig
from megafusion.sequence.document import IGNORED_LABEL


class ObjectiveConfig(Config):
    """total = text + image_weight x image."""

    image_weight: float = Field(5.0, ge=0)
    """The paper's lambda: the weight of the mean diffusion loss an image beside the mean loss a token."""
    schedule: ScheduleConfig = ScheduleConfig()
    """The noise process."""


class Losses(NamedTuple):
    """This part's share of the two global means: summed over parts, they are the means."""

    text: Tensor
    image: Tensor
    total: Tensor


def text_loss(logits_BSV: Tensor, labels_BS: Tensor, num_text_targets: Tensor) -> Tensor:
    """Cross-entropy in nats summed over the labels that count, over the global number of targets."""
    summed = F.cross_entropy(
        logits_BSV.float().flatten(0, 1), labels_BS.flatten(), ignore_index=IGNORED_LABEL, reduction="sum"
    )
    return summed / num_text_targets.clamp(min=1)


def image_loss(prediction_BNCHW: Tensor, target_BNCHW: Tensor, used_BN: Tensor, num_images: Tensor) -> Tensor:
    """Mean squared error of each used image summed, over the global number of images."""
    error_BN = (prediction_BNCHW.float() - target_BNCHW).square().mean(dim=(2, 3, 4))
    return torch.where(used_BN, error_BN, 0).sum() / num_images.clamp(min=1)


def total_loss(text: Tensor, image: Tensor, config: ObjectiveConfig) -> Losses:
    """Both losses added once, so that backward runs once."""
    return Losses(text, image, text + config.image_weight * image)
