"""How torch.distributed.checkpoint plans with Boxes.

torch's own planners take tensors alone, refuse overlap, and unpickle what a checkpoint holds beside tensors.
"""

import io
from math import prod
from typing import NoReturn

from torch import Tensor
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    create_default_global_save_plan,
)
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import ReadItem, SavePlan, WriteItem

from megafusion.train.boxes import Boxes, is_covered


class BoxSavePlanner(DefaultSavePlanner):
    """Writes each rank's boxes, once where several ranks hold the same one.

    Tensor-parallel ranks hold equal copies of a parameter that is not cut, which ZeRO may cut at other
    places on each. Boxes of such copies overlap; as their values are equal, either is right to write and
    to read, so overlap is left alone. What must never be is a gap.
    """

    def __init__(self):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans = self._dedup_save_plans(_largest(all_plans))
        plans, metadata = create_default_global_save_plan(plans)
        for name, entry in metadata.state_dict_metadata.items():
            boxes = [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks]
            assert is_covered(tuple(entry.size), boxes), f"{name}: the ranks do not hold the whole of it"
        return plans, metadata

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].__get_tensor_shard__(index)


def _largest(plans: list[SavePlan]) -> list[SavePlan]:
    """Plans without the boxes that begin where a larger one does.

    torch knows a box by its name and offsets alone. Boxes of ranges lie within each other where they
    begin together: the shorter range ends first.
    """
    largest: dict[MetadataIndex, int] = {}
    for plan in plans:
        for item in plan.items:
            largest[item.index] = max(largest.get(item.index, 0), _volume(item))
    return [
        SavePlan([item for item in plan.items if _volume(item) == largest[item.index]], plan.storage_data)
        for plan in plans
    ]


def _volume(item: WriteItem) -> int:
    return prod(item.tensor_data.chunk.sizes)


class BoxLoadPlanner(DefaultLoadPlanner):
    """Reads into boxes, and reads nothing but tensors."""

    def __init__(self):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self, state_dict: dict[str, Boxes], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        # Not torch's, which puts None in the place of whatever is not a tensor.
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> NoReturn:
        raise AssertionError(f"{read_item.dest_index.fqn}: bytes, which are never unpickled")

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].__get_tensor_shard__(index)
