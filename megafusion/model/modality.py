"""Weights of their own for image patches (mixture of transformers, arXiv 2411.04996); attention is shared."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Permute(torch.autograd.Function):
    """Rows in another order. Its gradient is the inverse permutation, where indexing's would add rows up."""

    @staticmethod
    def forward(context, x_TD: Tensor, order: Tensor, inverse: Tensor) -> Tensor:  # type: ignore[override]
        context.save_for_backward(inverse)
        return x_TD.index_select(0, order)

    @staticmethod
    def backward(context, gradient_TD: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (inverse,) = context.saved_tensors
        return gradient_TD.index_select(0, inverse), None, None


class Modality(NamedTuple):
    """Which positions are image patches; made once a batch.

    is_patch: bool [B, S, 1]; is_patch_residual: the same at the positions that the residual stream has on
    this rank. order, inverse int64 [B S]: positions sorted by modality, texts first, and back. ends int32
    [2]: ends of texts and of patches in that order. num_texts: the first end, on a CPU; elsewhere reading it
    would wait for the device.
    """

    is_patch: Tensor
    is_patch_residual: Tensor
    order: Tensor
    inverse: Tensor
    ends: Tensor
    num_texts: int | None

    def sort(self, x_BSD: Tensor) -> Tensor:
        """[T, D] of all positions, those of texts first."""
        return _Permute.apply(x_BSD.flatten(0, 1), self.order, self.inverse)

    def unsort(self, x_TD: Tensor) -> Tensor:
        """[B, S, D] of sorted positions."""
        return _Permute.apply(x_TD, self.inverse, self.order).unflatten(0, self.is_patch.shape[:2])

    def linear(self, x_TD: Tensor, weight: Tensor, image_weight: Tensor) -> Tensor:
        """Each of the sorted positions times the weight of its modality."""
        if self.num_texts is None:
            weights = torch.stack([weight, image_weight]).transpose(1, 2)
            return F.grouped_mm(x_TD, weights, offs=self.ends)
        # Backward of `split` is one concatenation; that of `tensor_split` adds up slices filled with zeros.
        texts, patches = x_TD.split((self.num_texts, len(x_TD) - self.num_texts))
        return torch.cat([F.linear(texts, weight), F.linear(patches, image_weight)])


def modality_of(is_patch_BS: Tensor, is_patch_residual_BS: Tensor) -> Modality:
    """From bool [B, S], of the positions in a block's products and in its residual stream."""
    is_patch = is_patch_BS.flatten()
    order = is_patch.to(torch.uint8).argsort(stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    num_texts = len(is_patch) - is_patch.sum()
    ends = torch.stack([num_texts, torch.full_like(num_texts, len(is_patch))]).int()
    on_host = int(num_texts) if is_patch.device.type == "cpu" else None
    return Modality(is_patch_BS[..., None], is_patch_residual_BS[..., None], order, inverse, ends, on_host)


class ModalityLinear(nn.Linear):
    """A linear layer, which with `for_patches` has another weight for image patches.

    It is then called with the modality of its positions, and computes over sorted ones: it sorts an input
    [B, S, D], and takes one of [T, D] as sorted. gives_sorted: its output stays sorted, [T, D].
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        for_patches: bool = False,
        gives_sorted: bool = False,
    ):
        super().__init__(in_features, out_features, bias)
        assert not (bias and gives_sorted), "a bias is added to positions in their own order"
        self.image_weight = nn.Parameter(torch.empty_like(self.weight)) if for_patches else None
        self.image_bias = nn.Parameter(torch.empty_like(self.bias)) if for_patches and bias else None
        self.gives_sorted, self.has_bias = gives_sorted, bias

    def forward(self, x: Tensor, *modality: Modality) -> Tensor:
        if self.image_weight is None:
            if not self.has_bias:
                return super().forward(x)
            # In two dimensions: in three, DeepSpeed's linear function (ZeRO 3) adds the bias in place to the
            # product, which selective recomputation has saved: twice.
            return super().forward(x.flatten(0, -2)).unflatten(0, x.shape[:-1])
        (each,) = modality
        y_TD = each.linear(x if x.ndim == 2 else each.sort(x), self.weight, self.image_weight)
        if self.gives_sorted:
            return y_TD
        y_BSD = each.unsort(y_TD)
        if self.image_bias is None:
            return y_BSD
        return y_BSD + torch.where(each.is_patch, self.image_bias, self.bias)


class ModalityRMSNorm(nn.RMSNorm):
    """RMSNorm whose weight depends on the modality; `is_patch` [..., 1] broadcasts to the input."""

    def __init__(self, size: int, eps: float):
        super().__init__(size, eps=eps)
        self.image_weight = nn.Parameter(torch.empty_like(self.weight))

    def forward(self, x: Tensor, is_patch: Tensor) -> Tensor:  # type: ignore[override]
        if x.dtype == torch.float32:
            weight = torch.where(is_patch, self.image_weight, self.weight)
            return F.rms_norm(x, self.normalized_shape, eps=self.eps) * weight
        # Half precision would be rounded before the weight, too: a text's bits are those of the plain norm.
        images = F.rms_norm(x, self.normalized_shape, self.image_weight, self.eps)
        return torch.where(is_patch, images, super().forward(x))
