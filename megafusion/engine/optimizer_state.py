"""The float32 weights and moments that this rank's optimizer owns, where DeepSpeed keeps them."""

from collections.abc import Iterable
from dataclasses import dataclass

import megafusion.device  # noqa: F401 - before deepspeed

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from megafusion.parallel.sharding import ShardSpec, shard_spec_of

DeepSpeedOptimizer = (
    torch.optim.AdamW | DeepSpeedZeroOptimizer | BF16_Optimizer | DeepSpeedZeroOptimizer_Stage3
)


@dataclass(frozen=True)
class OptimizerShard:
    """A fragment of a parameter: elements [start, start + len(weight)) of the flattened local parameter.

    The three tensors are 1-D float32 views of the optimizer's own storage: writing to them takes effect
    (for the weights that the forward reads, after `refresh`).
    """

    name: str
    """Canonical name of the parameter, the same in every topology."""
    layout: ShardSpec
    """Where the local parameter lies in the whole one."""
    start: int
    weight: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


def optimizer_shards(
    engine: DeepSpeedEngine, named_parameters: Iterable[tuple[str, nn.Parameter]]
) -> list[OptimizerShard]:
    """What this rank's optimizer owns of parameters (canonical name, parameter), with no communication.

    ZeRO 0 in float32 and 1, 2 and 3 in any precision, the optimizer on the device or offloaded to the host.
    An optimizer that has not stepped yet is given its moments: zeros, as its first step would.
    """
    for storage in _storages(engine.optimizer):
        _ensure_moments(engine.optimizer, storage)
    owned = []
    for name, parameter in named_parameters:
        assert parameter.requires_grad, f"{name}: the optimizer knows trained parameters alone"
        if (place := _place(engine.optimizer, parameter)) is None:
            continue
        state = _adamw(engine.optimizer).state[place.storage]
        fragments = [
            tensor.detach().view(-1).narrow(0, place.offset, place.length)
            for tensor in (place.storage, state["exp_avg"], state["exp_avg_sq"])
        ]
        owned.append(OptimizerShard(name, shard_spec_of(parameter), place.start, *fragments))
    return owned


@torch.no_grad()
def sync_model_from_master(engine: DeepSpeedEngine, step: int) -> None:
    """After masters were written to: AdamW's count of steps, and the weights that the forward reads.

    Called by every rank, for data-parallel ranks exchange their parts.
    """
    optimizer = engine.optimizer
    for state in _adamw(optimizer).state.values():
        state["step"].fill_(step)
    if isinstance(optimizer, torch.optim.AdamW):
        return  # its masters are the weights
    if not isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        optimizer.update_lp_params()
        return
    # As its own step ends: release what is gathered, put each part in place, and gather the parameters that
    # stay whole on every rank.
    optimizer._partition_all_parameters()
    for group in range(len(optimizer.fp16_groups)):
        optimizer._reassign_or_swap_out_partitioned_parameters(group)
    optimizer._post_step(())


@dataclass(frozen=True)
class _Place:
    """Where a fragment lies in the optimizer: in which tensor, from where; and what of a parameter it is."""

    storage: Tensor
    offset: int
    start: int
    length: int


def _place(optimizer: DeepSpeedOptimizer, parameter: nn.Parameter) -> _Place | None:
    """None where this rank owns nothing of a parameter."""
    if isinstance(optimizer, torch.optim.AdamW):
        return _Place(parameter, 0, 0, parameter.numel())
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        group, offset, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = length * optimizer._get_param_partition_rank(parameter)
        length = min(length, parameter.ds_numel - start)  # the last ranks' parts are padded
        storage = optimizer.fp32_partitioned_groups_flat[group]
        return _Place(storage, offset, start, length) if length > 0 else None
    if (mapping := parameter._hp_mapping) is None:
        return None
    storage = optimizer.optimizer.param_groups[mapping.param_group_index]["params"][0]
    here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
    return _Place(storage, here.start, there.start, here.numel)


def _storages(optimizer: DeepSpeedOptimizer) -> list[Tensor]:
    """The tensors that AdamW updates on this rank."""
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        # Between steps its groups are empty.
        assert not optimizer.swap_optimizer, "an optimizer swapped to disk has nothing to view"
        return optimizer.fp32_partitioned_groups_flat
    return [tensor for group in _adamw(optimizer).param_groups for tensor in group["params"]]


def _adamw(optimizer: DeepSpeedOptimizer) -> torch.optim.AdamW:
    adamw = optimizer if isinstance(optimizer, torch.optim.AdamW) else optimizer.optimizer
    assert isinstance(adamw, torch.optim.AdamW), f"{type(adamw).__name__} is not AdamW"
    return adamw


def _ensure_moments(optimizer: DeepSpeedOptimizer, storage: Tensor) -> None:
    assert storage.dtype == torch.float32, f"masters are float32, these are {storage.dtype}"
    state = _adamw(optimizer).state[storage]
    if not state:
        state["step"] = torch.zeros((), device=storage.device)
        state["exp_avg"] = torch.zeros_like(storage.detach())
        state["exp_avg_sq"] = torch.zeros_like(storage.detach())
