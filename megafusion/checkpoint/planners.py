"""How torch.distributed.checkpoint plans with Boxes.

torch's own planners take tensors alone, refuse overlap, and unpickle what a checkpoint holds beside tensors.
"""

import io
from typing import NoReturn

from torch import Tensor
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    create_default_global_save_plan,
)
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import ReadItem, SavePlan

from megafusion.checkpoint.chunks import Chunks, is_covered


class ChunkSavePlanner(DefaultSavePlanner):
    """Writes each rank's boxes, one from each place.

    Tensor-parallel ranks hold equal copies of a parameter that is not cut, which ZeRO may cut at other
    places on each. Boxes of such copies overlap; as their values are equal, either is right to write and
    to read, so overlap is left alone. torch knows a box by its name and offsets, and of those that begin
    together keeps one, long or short. That leaves no gap: where the kept one ends, its own copy goes on.
    """

    def __init__(self):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans = self._dedup_save_plans(all_plans)
        plans, metadata = create_default_global_save_plan(plans)
        for name, entry in metadata.state_dict_metadata.items():
            boxes = [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks]
            assert is_covered(tuple(entry.size), boxes), f"{name}: the ranks do not hold the whole of it"
        return plans, metadata

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].__get_tensor_shard__(index)


class ChunkLoadPlanner(DefaultLoadPlanner):
    """Reads into boxes, and reads nothing but tensors."""

    def __init__(self):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self, state_dict: dict[str, Chunks], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        # Not torch's, which puts None in the place of whatever is not a tensor.
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> NoReturn:
        raise AssertionError(f"{read_item.dest_index.fqn}: bytes, which are never unpickled")

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].__get_tensor_shard__(index)
