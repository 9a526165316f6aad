"""Distances between two sets of images by their features: Frechet and kernel, both by torchmetrics."""

from collections.abc import Callable, Iterable
from itertools import groupby, islice
from typing import Any

import torch
from torch import Tensor, nn

from megafusion.errors import UserError


class _Given(nn.Module):
    """Hands torchmetrics the features that it is given in place of images."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features_ND: Tensor) -> Tensor:
        return features_ND


def frechet_distance(real_ND: Tensor, drawn_ND: Tensor) -> float:
    """|mean difference|^2 + trace(S + T - 2 (S T)^(1/2)) of the features' means and covariances S and T."""
    metric = _import("fid").FrechetInceptionDistance(_Given(real_ND.shape[1]))
    return _compute(metric, real_ND, drawn_ND)[0]


def kernel_distance(real_ND: Tensor, drawn_ND: Tensor, subsets: int, subset_size: int) -> tuple[float, float]:
    """Mean and standard deviation of KID over random subsets, whose seed is fixed.

    Of as many images as a subset or fewer, all subsets are the same.
    """
    size = min(subset_size, len(real_ND), len(drawn_ND))
    metric = _import("kid").KernelInceptionDistance(
        _Given(real_ND.shape[1]), subsets=subsets, subset_size=size
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mean, deviation = _compute(metric, real_ND, drawn_ND)
    return mean, deviation


@torch.no_grad()
def features_of(embed: Callable[[Tensor], Tensor], images: Iterable[Tensor], batch_size: int = 64) -> Tensor:
    """Features [N, D], float32 on the CPU, of images [3, H, W]: batches of consecutive ones of one size."""
    found: list[Tensor] = []
    for _, run in groupby(images, lambda image: image.shape):
        while batch := list(islice(run, batch_size)):
            found.append(embed(torch.stack(batch)).float().cpu())
    return torch.cat(found)


def _compute(metric: nn.Module, real_ND: Tensor, drawn_ND: Tensor) -> list[float]:
    if min(len(real_ND), len(drawn_ND)) < 2:
        raise UserError(
            f"a distance of {len(real_ND)} real and {len(drawn_ND)} drawn images: give 2 of each or more"
        )
    for features, real in ((real_ND, True), (drawn_ND, False)):
        metric.update(features.double(), real=real)
    found = metric.compute()
    return [float(value) for value in (found if isinstance(found, tuple) else (found,))]


def _import(name: str) -> Any:
    try:
        from torchmetrics.image import fid, kid
    except ImportError as error:
        raise UserError(f"images: needs torchmetrics; pip install 'megafusion[eval]' ({error})") from error
    return {"fid": fid, "kid": kid}[name]
