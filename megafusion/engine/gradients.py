"""The gradients of a step, reduced over data ranks, in the storage in which DeepSpeed keeps them."""

from abc import ABC, abstractmethod
from functools import partial

import megafusion.device  # noqa: F401 - before deepspeed

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.utils import all_gather_dp_groups
from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID, DeepSpeedZeroOptimizer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from megafusion.engine.optimizer_state import OptimizerState


def make_gradients(engine: DeepSpeedEngine, state: OptimizerState) -> "Gradients":
    """The gradients of an engine of any kind. Called once, before its first backward pass."""
    optimizer = engine.optimizer
    if isinstance(optimizer, torch.optim.AdamW):
        return PlainGradients(engine, state)
    if isinstance(optimizer, BF16_Optimizer):
        return Float32Sums(engine, state)
    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        return ZeroGradients(engine, state)
    return Zero3Gradients(engine, state)


class Gradients(ABC):
    """Differences between DeepSpeed's optimizers: where gradients are, and how weights reach the model."""

    has_replicas = False
    """Whether every data rank holds the same gradients, and not its share of them."""
    model_parts: list[Tensor] | None = None
    """This rank's part of the model's weights for each of the optimizer's storages, where an update may
    write them in the same pass."""

    def __init__(self, engine: DeepSpeedEngine, state: OptimizerState):
        self._engine, self._optimizer, self._state = engine, engine.optimizer, state
        self._hooks: list[RemovableHandle] = []

    @abstractmethod
    def take(self) -> list[Tensor | None]:
        """Float32 gradients for each of the optimizer's storages, of its size; None without any.

        Called once a step, after the last backward pass.
        """

    @abstractmethod
    def clear(self) -> None:
        """Drop the gradients."""

    def close(self) -> None:
        """Remove hooks."""
        for hook in self._hooks:
            hook.remove()

    def sync_model(self) -> None:
        """Copy the updated master weights into the model's, on every rank."""
        self._state.sync_model()

    def gather_model(self) -> None:
        """Exchange the parts of the model's weights between data ranks, after `model_parts` were written."""
        raise NotImplementedError


class PlainGradients(Gradients):
    """ZeRO 0: autograd's, which DeepSpeed has summed over data ranks."""

    has_replicas = True

    def take(self) -> list[Tensor | None]:
        return [storage.weight.grad for storage in self._state.storages]

    def clear(self) -> None:
        self._engine.zero_grad()


class Float32Sums(Gradients):
    """ZeRO 1 in bf16: float32 sums, to which each gradient is added as it comes, in one kernel.

    The first gradient of a step replaces the old sum, so that nothing is filled with zeros. DeepSpeed's own
    accumulation finds no gradient and does nothing.
    """

    def __init__(self, engine: DeepSpeedEngine, state: OptimizerState):
        super().__init__(engine, state)
        optimizer = engine.optimizer
        engine.enable_backward_allreduce = engine.pipeline_enable_backward_allreduce = False
        self._sums = [
            sums.view(parameter.shape)
            for group, flats in zip(optimizer.bf16_groups, optimizer.fp32_groups_gradients, strict=True)
            for parameter, sums in zip(group, flats, strict=True)
        ]
        self._has_gradient = [False] * len(self._sums)
        parameters = [parameter for group in optimizer.bf16_groups for parameter in group]
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(partial(self._add, index))
            for index, parameter in enumerate(parameters)
        ]
        self._group, self._rank = optimizer.dp_process_group, dist.get_rank(optimizer.dp_process_group)
        self.model_parts = [parts[self._rank] for parts in optimizer.bf16_partitioned_groups]

    def _add(self, index: int, parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        if self._has_gradient[index]:
            self._sums[index].add_(parameter.grad)
        else:
            self._sums[index].copy_(parameter.grad)
        self._has_gradient[index], parameter.grad = True, None

    def take(self) -> list[Tensor | None]:
        stale = [s for s, has in zip(self._sums, self._has_gradient, strict=True) if not has]
        if stale:
            torch._foreach_zero_(stale)
        parts = self._optimizer.fp32_groups_gradient_flat_partition
        if (size := dist.get_world_size(self._group)) > 1:
            for whole, part in zip(self._optimizer.fp32_groups_gradients_flat, parts, strict=True):
                dist.reduce_scatter_tensor(part, whole, group=self._group)
            torch._foreach_mul_(parts, 1.0 / size)
        return parts

    def clear(self) -> None:
        self._has_gradient = [False] * len(self._sums)

    def gather_model(self) -> None:
        optimizer = self._optimizer
        all_gather_dp_groups(
            groups_flat=optimizer.bf16_groups_flat,
            partitioned_param_groups=optimizer.bf16_partitioned_groups,
            dp_process_group=optimizer.real_dp_process_group,
            start_alignment_factor=optimizer.nccl_start_alignment_factor,
            allgather_bucket_size=optimizer.allgather_bucket_size,
        )


class ZeroGradients(Gradients):
    """ZeRO 1 and 2: each parameter's part in this rank's share, flattened here; on the host with offload."""

    def take(self) -> list[Tensor | None]:
        optimizer = self._optimizer
        if optimizer.cpu_offload:
            optimizer._wait_for_offload_copies()
            return [storage.grad for storage in optimizer.single_partition_of_fp32_groups]
        return [self._flatten(i, storage.weight) for i, storage in enumerate(self._state.storages)]

    def _flatten(self, group: int, storage: Tensor) -> Tensor:
        flat = self._optimizer._get_preflattened_grad_partition(group)
        if flat is not None:
            return flat.to(storage.dtype)
        found = self._optimizer.averaged_gradients[group]
        if missing := storage.numel() - sum(gradient.numel() for gradient in found):
            found = [*found, found[0].new_zeros(missing)]  # the last rank's share is padded
        self._optimizer.averaged_gradients[group] = None
        return self._optimizer.flatten(found).to(storage.dtype)

    def clear(self) -> None:
        optimizer = self._optimizer
        optimizer.micro_step_id = INITIAL_MICRO_STEP_ID
        optimizer._release_preflattened_grad_buffers()
        optimizer.averaged_gradients = dict.fromkeys(optimizer.averaged_gradients)
        optimizer.all_grad_tensors = dict.fromkeys(optimizer.all_grad_tensors)
        optimizer.zero_grad()
        if optimizer.cpu_offload:
            optimizer._offload_accumulated_param_ids = set()
            optimizer.reset_cpu_buffers()


class Zero3Gradients(Gradients):
    """ZeRO 3: each parameter's partition, flattened here; on the host with offload."""

    def take(self) -> list[Tensor | None]:
        optimizer = self._optimizer
        optimizer._pre_step()
        if optimizer.offload_optimizer:
            return [storage.grad for storage in optimizer.fp32_partitioned_groups_flat]
        return [self._flatten(i, storage.weight) for i, storage in enumerate(self._state.storages)]

    def _flatten(self, group: int, storage: Tensor) -> Tensor:
        found = self._optimizer.averaged_gradients.pop(group)
        return self._optimizer.flatten(found).to(storage.dtype)

    def clear(self) -> None:
        self._optimizer.zero_grad()
