"""Planners of torch.distributed.checkpoint (DCP) for Chunks.

DCP's own planners accept only tensors, reject overlapping chunks, and unpickle objects that are not tensors.
"""

import io
from typing import NoReturn

from torch import Tensor
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    create_default_global_save_plan,
)
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem, SavePlan

from megafusion.checkpoint.chunks import Chunks, is_covered


class ChunkSavePlanner(DefaultSavePlanner):
    """Writes each rank's chunks, equal ones once.

    Tensor-parallel ranks hold equal copies of a replicated parameter, and ZeRO may split each copy elsewhere.
    Chunks of such copies overlap. Their values are equal, so either may be written and read, and overlap is
    allowed. DCP identifies a chunk by name and offsets, and of chunks with equal offsets keeps one, short or
    long. This leaves no gap: where the kept one ends, the next chunk of its own copy begins.
    """

    def __init__(self):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans = self._dedup_save_plans(all_plans)
        plans, metadata = create_default_global_save_plan(plans)
        for name, entry in metadata.state_dict_metadata.items():
            assert isinstance(entry, TensorStorageMetadata), name
            chunks = [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks]
            assert is_covered(tuple(entry.size), chunks), f"{name}: the chunks of all ranks do not cover it"
        return plans, metadata

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].__get_tensor_shard__(index)


class ChunkLoadPlanner(DefaultLoadPlanner):
    """Reads tensors, and nothing else, into chunks."""

    def __init__(self):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self, state_dict: dict[str, Chunks], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        # DCP's own replaces everything that is not a tensor by None.
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> NoReturn:
        raise AssertionError(f"{read_item.dest_index.fqn}: pickled bytes, which are never loaded")

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].__get_tensor_shard__(index)
