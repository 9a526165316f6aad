"""Cross-entropy of next-token logits that are never whole: a chunk's are made, used and dropped.

Forward computes a chunk's logits, its loss, and from the same logits its gradients, so that backward has no
products. A chunk's logits are in the dtype of the weights; their statistics are float32.
"""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megafusion.objective.config import LOGITS_ALIGNMENT
from megafusion.sequence.document import IGNORED_LABEL

Merge = Callable[[Tensor], Tensor]
"""From [3, R], figures of each position among this rank's columns, to the same among all columns: the largest
logit; the log of the sum of exponentials, each divided by the largest's; the target's logit, or 0."""


def summed_nats(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_R: Tensor,
    index_R: Tensor,
    chunk_size: int,
    first_column: int = 0,
    merge: Merge = lambda statistics: statistics,
    is_compiled: bool = False,
    z_loss: float = 0.0,
) -> Tensor:
    """Cross-entropy in nats, float32 [], summed over the labels that count.

    index_R: the row of hidden_ND that each label belongs to, each row at most once. chunk_size: labels
    whose logits are there at once. first_column: the token of the weight's first row. is_compiled:
    torch.compile fuses the passes over logits. z_loss: where there are gradients, the weight of
    log(sum of exponentials)^2 of each label that counts, which is added.
    """
    wants_gradients = torch.is_grad_enabled()
    return _SummedNats.apply(
        hidden_ND,
        weight_VD,
        labels_R,
        index_R,
        chunk_size,
        first_column,
        merge,
        is_compiled,
        wants_gradients,
        z_loss,
    )


class _SummedNats(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        labels_R: Tensor,
        index_R: Tensor,
        chunk_size: int,
        first_column: int,
        merge: Merge,
        is_compiled: bool,
        wants_gradients: bool,
        z_loss: float,
    ) -> Tensor:
        ctx.dtypes = hidden_ND.dtype, weight_VD.dtype
        log_sum, to_softmax = _passes(is_compiled)
        wants_hidden, wants_weight = (wants_gradients and each for each in ctx.needs_input_grad[:2])
        grad_hidden = torch.zeros_like(hidden_ND) if wants_hidden else None
        grad_weight = None
        # Products whose rows are not aligned leave the GPU's fast kernels. The logits of these columns are 0.
        num_columns = len(weight_VD)
        padded_VD = F.pad(weight_VD, (0, 0, 0, -num_columns % LOGITS_ALIGNMENT))
        nats = torch.zeros((), device=hidden_ND.device)
        for labels, index in zip(labels_R.split(chunk_size), index_R.split(chunk_size), strict=True):
            hidden = hidden_ND.index_select(0, index)
            all_logits = hidden @ padded_VD.T
            logits = all_logits[:, :num_columns]
            is_local = (labels >= first_column) & (labels < first_column + num_columns)
            column = torch.where(is_local, labels - first_column, 0)[:, None]
            target = torch.where(is_local, logits.gather(1, column)[:, 0].float(), 0)
            largest, total, target = merge(torch.stack([*log_sum(logits), target]))
            target, counts = target - largest, labels != IGNORED_LABEL
            nats += torch.where(counts, total - target, 0).sum()
            log_sums = largest + total
            if z_loss and wants_gradients:
                nats += torch.where(counts, z_loss * log_sums.square(), 0).sum()
            if not (wants_hidden or wants_weight):
                continue
            # The gradient is softmax - 1 at the target, softmax elsewhere, and 0 without a target.
            to_softmax(logits, largest, torch.where(counts, total, torch.inf))
            at_target = torch.expm1(target - total)
            if z_loss:  # whose gradient is softmax x 2 z_loss log_sums
                slope = 2 * z_loss * log_sums
                logits.mul_(1 + slope[:, None])
                at_target += slope * torch.exp(target - total)
            at_column = torch.where(is_local, at_target, logits.gather(1, column)[:, 0])
            logits.scatter_(1, column, at_column[:, None].to(logits.dtype))
            if grad_hidden is not None:
                grad_hidden.index_copy_(0, index, all_logits @ padded_VD)
            if wants_weight:
                product = all_logits.T @ hidden
                grad_weight = product.float() if grad_weight is None else grad_weight.add_(product)
            del all_logits, logits  # before the next chunk's are made
        ctx.save_for_backward(grad_hidden, grad_weight if grad_weight is None else grad_weight[:num_columns])
        return nats

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        scaled = (
            # In float32: bf16 would round the factor, too.
            None if each is None else (each.float() * gradient).to(dtype)
            for each, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *scaled, *[None] * 8


@cache
def _passes(is_compiled: bool) -> tuple[Callable, Callable]:
    """The passes over a chunk's logits."""
    passes = _log_sum, _to_softmax
    return (torch.compile(passes[0]), torch.compile(passes[1])) if is_compiled else passes


def _log_sum(logits_RV: Tensor) -> tuple[Tensor, Tensor]:
    """The largest logit, and the log of the sum of exponentials that are divided by its; float32 [R]."""
    largest = logits_RV.amax(-1).float()
    return largest, (logits_RV.float() - largest[:, None]).exp_().sum(-1).log()


def _to_softmax(logits_RV: Tensor, largest_R: Tensor, total_R: Tensor) -> None:
    """Write exp(logits - largest - total) over the logits."""
    logits_RV.copy_((logits_RV.float() - largest_R[:, None]).sub_(total_R[:, None]).exp_())
