"""This rank's master weights and AdamW moments, viewed in the storage in which DeepSpeed keeps them."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import megafusion.device  # noqa: F401 - before deepspeed

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from megafusion.parallel.sharding import ShardSpec, shard_spec_of

DeepSpeedOptimizer: TypeAlias = (
    torch.optim.AdamW | DeepSpeedZeroOptimizer | BF16_Optimizer | DeepSpeedZeroOptimizer_Stage3
)


@dataclass(frozen=True)
class OptimizerShard:
    """Elements [start, start + len(weight)) of a flattened local parameter, owned by this rank's optimizer.

    The tensors are 1-D float32 views of the optimizer's storage. Writing to them takes effect at once, in the
    weights that the forward reads after `OptimizerState.sync_model_from_master`.
    """

    name: str
    """Canonical name of the parameter, the same in every topology."""
    shard_spec: ShardSpec
    """The local parameter's part of the whole one."""
    start: int
    weight: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    storage: Tensor
    """The optimizer's own tensor, whose elements from `offset` on are `weight`."""
    offset: int


class Storage(NamedTuple):
    """A tensor that AdamW updates on this rank, its state, and its group's learning rate and weight decay."""

    weight: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
    group: dict[str, Any]


@dataclass(frozen=True)
class FrozenShard:
    """Elements [start, start + len(weight)) of a flattened frozen parameter that this rank holds.

    weight: 1-D view of the model's own storage, in the type in which the forward reads it.
    """

    name: str
    shard_spec: ShardSpec
    start: int
    weight: Tensor


class OptimizerState:
    """The optimizer shards of this rank and what it holds of frozen parameters, made without communication.

    Supports ZeRO 0 in float32, and ZeRO 1, 2 and 3 in any precision, with the optimizer on the device or
    offloaded to the host. named_parameters: by canonical name, in the order
    in which forward uses them; those without requires_grad are frozen.
    """

    def __init__(self, optimizer: DeepSpeedOptimizer, named_parameters: Iterable[tuple[str, nn.Parameter]]):
        self._optimizer = optimizer
        self._adamw = optimizer if isinstance(optimizer, torch.optim.AdamW) else optimizer.optimizer
        assert isinstance(self._adamw, torch.optim.AdamW), f"{type(self._adamw).__name__} is not AdamW"
        self.storages = [
            Storage(storage, **_moments(self._adamw, storage), group=group)
            for storage, group in _storages(optimizer, self._adamw)
        ]
        self.parameters: list[nn.Parameter] = []
        """Those that are trained, in their order."""
        self.shards: list[OptimizerShard] = []
        self.frozen: list[FrozenShard] = []
        for name, parameter in named_parameters:
            if not parameter.requires_grad:
                self.frozen.append(_frozen_shard(name, parameter))
                continue
            self.parameters.append(parameter)
            if shard := self._shard(name, parameter):
                self.shards.append(shard)

    def _shard(self, name: str, parameter: nn.Parameter) -> OptimizerShard | None:
        if (found := _find_fragment(self._optimizer, parameter)) is None:
            return None
        storage, offset, start, length = found
        state = self._adamw.state[storage]
        weight, exp_avg, exp_avg_sq = (
            tensor.detach().view(-1).narrow(0, offset, length)
            for tensor in (storage, state["exp_avg"], state["exp_avg_sq"])
        )
        spec = shard_spec_of(parameter)
        return OptimizerShard(name, spec, start, weight, exp_avg, exp_avg_sq, storage, offset)

    @torch.no_grad()
    def sync_model_from_master(self, step: int) -> None:
        """Copy the master weights into the model's, and set AdamW's step count.

        Called by every rank after the shards were written to, frozen ones too: data-parallel ranks exchange
        their parts.
        """
        for state in self._adamw.state.values():
            state["step"].fill_(step)
        self.sync_model()

    @torch.no_grad()
    def sync_model(self) -> None:
        """Copy the master weights into the model's. Called by every rank."""
        optimizer = self._optimizer
        if isinstance(optimizer, torch.optim.AdamW):
            return  # its master weights are the model's
        if not isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
            optimizer.update_lp_params()
            return
        # As its own step ends: release gathered parameters, copy each partition, and gather the parameters
        # that stay whole on every rank.
        optimizer._partition_all_parameters()
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        optimizer._post_step(())


def _frozen_shard(name: str, parameter: Any) -> FrozenShard:
    """All of a frozen parameter; at ZeRO 3, with DeepSpeed's attributes, this rank's partition of it."""
    weight, start = parameter.detach().view(-1), 0
    if hasattr(parameter, "ds_tensor"):
        weight = parameter.ds_tensor.detach().view(-1)
        start = len(weight) * dist.get_rank(parameter.ds_process_group)
        weight = weight[: max(0, parameter.ds_numel - start)]  # the last ranks' partitions are padded
    return FrozenShard(name, shard_spec_of(parameter), start, weight)


def _find_fragment(optimizer: DeepSpeedOptimizer, parameter: Any) -> tuple[Tensor, int, int, int] | None:
    """This rank's fragment of a parameter (with DeepSpeed's attributes); None if it owns none.

    Returns storage, offset, start, length: elements [offset, offset + length) of the optimizer's storage are
    the flattened parameter's from start on.
    """
    if isinstance(optimizer, torch.optim.AdamW):
        return parameter, 0, 0, parameter.numel()
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        group, offset, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = length * optimizer._get_param_partition_rank(parameter)
        length = min(length, parameter.ds_numel - start)  # the last ranks' partitions are padded
        storage = optimizer.fp32_partitioned_groups_flat[group]
        return (storage, offset, start, length) if length > 0 else None
    if (mapping := parameter._hp_mapping) is None:
        return None
    storage = optimizer.optimizer.param_groups[mapping.param_group_index]["params"][0]
    master, model = mapping.hp_fragment_address, mapping.lp_fragment_address
    return storage, master.start, model.start, master.numel


def _storages(optimizer: DeepSpeedOptimizer, adamw: torch.optim.AdamW) -> list[tuple[Tensor, dict[str, Any]]]:
    """The tensors that AdamW updates on this rank, with their groups."""
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        # Between steps its parameter groups are empty.
        assert not optimizer.swap_optimizer, "an optimizer swapped to disk has no tensors to view"
        groups = optimizer.sub_group_to_group_id
        flats = optimizer.fp32_partitioned_groups_flat
        return [(flat, adamw.param_groups[groups[i]]) for i, flat in enumerate(flats)]
    return [(tensor, group) for group in adamw.param_groups for tensor in group["params"]]


def _moments(adamw: torch.optim.AdamW, storage: Tensor) -> dict[str, Tensor]:
    """AdamW's state of a tensor, which starts from zero as its first step would."""
    assert storage.dtype == torch.float32, f"master weights must be float32, these are {storage.dtype}"
    state = adamw.state[storage]
    if not state:
        state["step"] = torch.zeros((), device=storage.device)
        state["exp_avg"] = torch.zeros_like(storage.detach())
        state["exp_avg_sq"] = torch.zeros_like(storage.detach())
    return {name: state[name] for name in ("exp_avg", "exp_avg_sq", "step")}
