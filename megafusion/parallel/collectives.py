"""Collectives with a gradient.

| function | forward | backward | Megatron's mappings.py |
|---|---|---|---|
| `copy` | nothing | all-reduce | copy_to_tensor_model_parallel_region |
| `all_reduce` | all-reduce | nothing | reduce_from_tensor_model_parallel_region |
| `all_gather` | all-gather | reduce-scatter | gather_from_sequence_parallel_region |
| `reduce_scatter` | reduce-scatter | all-gather | reduce_scatter_to_sequence_parallel_region |
| `all_gather_replicated` | all-gather | slice | gather_from_tensor_model_parallel_region |

See arXiv 1909.08053, section 3, and for sequence parallelism arXiv 2205.05198, section 4.2. They call torch's
functional collectives, which torch.compile and selective checkpointing understand, and which have the
gradients of `all_gather` and `reduce_scatter`.
"""

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup

_FUNCTIONAL = torch.ops._c10d_functional


def all_gather(x: Tensor, group: Group, dim: int) -> Tensor:
    """The ranks' slices concatenated, for different work on each rank, whose gradients are summed."""
    size = group.size()
    rows = _FUNCTIONAL.wait_tensor(_FUNCTIONAL.all_gather_into_tensor(x.contiguous(), size, group.group_name))
    return rows if dim == 0 else torch.cat(rows.chunk(size), dim)


def reduce_scatter(x: Tensor, group: Group, dim: int) -> Tensor:
    """This rank's slice of the sum over ranks."""
    size = group.size()
    rows = x.contiguous() if dim == 0 else torch.cat(x.chunk(size, dim))
    return _FUNCTIONAL.wait_tensor(_FUNCTIONAL.reduce_scatter_tensor(rows, "sum", size, group.group_name))


def _sum(x: Tensor, group: Group) -> Tensor:
    return _FUNCTIONAL.wait_tensor(_FUNCTIONAL.all_reduce(x.contiguous(), "sum", group.group_name))


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return _sum(gradient, ctx.group), None


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: Group) -> Tensor:
        return _sum(x, group)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _AllGatherReplicated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: Group) -> Tensor:
        ctx.group, ctx.length = group, x.shape[0]
        return all_gather(x, group, 0)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        start = dist.get_rank(ctx.group) * ctx.length
        return gradient[start : start + ctx.length], None


def copy(x: Tensor, group: Group) -> Tensor:
    """The same tensor, for different work on each rank, whose gradients are summed."""
    return _Copy.apply(x, group)


def all_reduce(x: Tensor, group: Group) -> Tensor:
    """The sum over ranks, for the same work on every rank."""
    return _AllReduce.apply(x, group)


def all_gather_replicated(x: Tensor, group: Group) -> Tensor:
    """The ranks' slices of dimension 0 concatenated, for the same work on every rank."""
    return _AllGatherReplicated.apply(x, group)
