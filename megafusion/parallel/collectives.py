"""Communication with a gradient: each function names what it does forward, and its docstring backward.

They are the conjugate pairs of Megatron (arXiv 1909.08053, section 3) and of its sequence parallelism
(arXiv 2205.05198, section 4.2). They are sent by torch's functional operations, which
torch.compile and selective checkpointing understand.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup

_FUNCTIONAL = torch.ops._c10d_functional


def _all_reduce(x: Tensor, group: Group) -> Tensor:
    return _FUNCTIONAL.wait_tensor(_FUNCTIONAL.all_reduce(x.contiguous(), "sum", group.group_name))


def _all_gather(x: Tensor, group: Group, dim: int) -> Tensor:
    size = group.size()
    rows = _FUNCTIONAL.wait_tensor(_FUNCTIONAL.all_gather_into_tensor(x.contiguous(), size, group.group_name))
    return rows if dim == 0 else torch.cat(rows.chunk(size), dim)


def _reduce_scatter(x: Tensor, group: Group, dim: int) -> Tensor:
    size = group.size()
    rows = x.contiguous() if dim == 0 else torch.cat(x.chunk(size, dim))
    return _FUNCTIONAL.wait_tensor(_FUNCTIONAL.reduce_scatter_tensor(rows, "sum", size, group.group_name))


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return _all_reduce(gradient, ctx.group), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: Group) -> Tensor:
        return _all_reduce(x, group)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: Group, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return _all_gather(x, group, dim)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _reduce_scatter(gradient, ctx.group, ctx.dim), None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: Group, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return _reduce_scatter(x, group, dim)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _all_gather(gradient, ctx.group, ctx.dim), None, None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: Group) -> Tensor:
        ctx.group, ctx.length = group, x.shape[0]
        return _all_gather(x, group, 0)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        own = dist.get_rank(ctx.group) * ctx.length
        return gradient[own : own + ctx.length], None


def copy(x: Tensor, group: Group) -> Tensor:
    """The same tensor, about to be used by each rank in its own way; the gradients are summed."""
    return _Copy.apply(x, group)


def reduce(x: Tensor, group: Group) -> Tensor:
    """The sum of the ranks' tensors, about to be used by all in the same way; the gradient is each one's."""
    return _Reduce.apply(x, group)


def gather(x: Tensor, group: Group, dim: int) -> Tensor:
    """The ranks' slices side by side, used by each in its own way; gradients are summed and sliced."""
    return _Gather.apply(x, group, dim)


def scatter(x: Tensor, group: Group, dim: int) -> Tensor:
    """This rank's slice of the sum of the ranks' tensors; the slices' gradients are put side by side."""
    return _Scatter.apply(x, group, dim)


def collect(x: Tensor, group: Group) -> Tensor:
    """The ranks' slices along dimension 0, used by all in the same way; each keeps its slice's gradient."""
    return _Collect.apply(x, group)


def sum_over(group: Group) -> Callable[[Tensor], Tensor]:
    """A gradient hook for a parameter that the ranks of a group hold alike and use in part each."""
    return lambda gradient: _all_reduce(gradient, group)
