"""The gradients of a step, reduced over data ranks, in the storage in which DeepSpeed keeps them."""

from abc import ABC, abstractmethod

import megafusion.device  # noqa: F401 - before deepspeed

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.utils import all_gather_dp_groups
from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID, DeepSpeedZeroOptimizer
from torch import Tensor

from megafusion.engine.buckets import Buckets, Group
from megafusion.engine.optimizer_state import OptimizerState


def make_gradients(engine: DeepSpeedEngine, state: OptimizerState) -> "Gradients":
    """The gradients of an engine of any kind. Called once, before its first backward pass."""
    optimizer = engine.optimizer
    if isinstance(optimizer, torch.optim.AdamW):
        return PlainGradients(engine, state)
    if isinstance(optimizer, DeepSpeedZeroOptimizer) and optimizer.cpu_offload:
        return OffloadedGradients(engine, state)
    if isinstance(optimizer, (BF16_Optimizer, DeepSpeedZeroOptimizer)):
        return ShardedGradients(engine, state)
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

    def end_micro_batch(self) -> None:
        """Called after the backward pass of each micro-batch, without a pipeline."""
        return

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
        return

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


class ShardedGradients(Gradients):
    """ZeRO 1 and 2: sums in float32, of which each data rank gets its share while backward still computes.

    DeepSpeed's own reduction, which waits for the device at each bucket, is switched off.
    """

    def __init__(self, engine: DeepSpeedEngine, state: OptimizerState):
        super().__init__(engine, state)
        optimizer = engine.optimizer
        engine.enable_backward_allreduce = engine.pipeline_enable_backward_allreduce = False
        whole: list[Tensor] | None = None
        if isinstance(optimizer, BF16_Optimizer):
            parameters, self._flats = optimizer.bf16_groups, optimizer.bf16_groups_flat
            self._partitions, whole = optimizer.bf16_partitioned_groups, optimizer.fp32_groups_gradients_flat
        else:
            for hook in optimizer._grad_acc_hooks:
                hook.remove()
            parameters, self._flats = optimizer.bit16_groups, optimizer.bit16_groups_flat
            self._partitions = optimizer.parallel_partitioned_bit16_groups
            if not optimizer.partition_gradients or dist.get_world_size(optimizer.dp_process_group) == 1:
                whole = [torch.zeros_like(flat, dtype=torch.float32) for flat in self._flats]
        group = optimizer.dp_process_group
        self.buckets = Buckets(
            [Group(*flat_and_own) for flat_and_own in zip(self._flats, parameters, strict=True)],
            state.parameters,
            group,
            engine.gradient_accumulation_steps(),
            whole,
        )
        self.model_parts = [parts[dist.get_rank(group)] for parts in self._partitions]

    def end_micro_batch(self) -> None:
        self.buckets.end_micro_batch()

    def take(self) -> list[Tensor | None]:
        return [*self.buckets.finish()]

    def clear(self) -> None:
        """Nothing: the first gradients of the next step replace these."""

    def close(self) -> None:
        self.buckets.close()

    def gather_model(self) -> None:
        optimizer = self._optimizer
        all_gather_dp_groups(
            groups_flat=self._flats,
            partitioned_param_groups=self._partitions,
            dp_process_group=optimizer.real_dp_process_group,
            start_alignment_factor=optimizer.nccl_start_alignment_factor,
            allgather_bucket_size=optimizer.allgather_bucket_size,
        )


class OffloadedGradients(Gradients):
    """ZeRO 1 and 2 with the optimizer on the host, to which DeepSpeed copies this rank's share."""

    def take(self) -> list[Tensor | None]:
        self._optimizer._wait_for_offload_copies()
        return [storage.grad for storage in self._optimizer.single_partition_of_fp32_groups]

    def clear(self) -> None:
        optimizer = self._optimizer
        optimizer.micro_step_id = INITIAL_MICRO_STEP_ID
        optimizer._release_preflattened_grad_buffers()
        optimizer.averaged_gradients = dict.fromkeys(optimizer.averaged_gradients)
        optimizer.all_grad_tensors = dict.fromkeys(optimizer.all_grad_tensors)
        optimizer.zero_grad()
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
