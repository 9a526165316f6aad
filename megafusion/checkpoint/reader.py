"""Reading a checkpoint without trusting it: torch pickles the list of its tensors."""

import pickle
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata, StorageMeta

from megafusion.checkpoint.chunks import Chunks
from megafusion.checkpoint.folder import DamagedCheckpoint, verify_checkpoint, way_out
from megafusion.checkpoint.planners import ChunkLoadPlanner
from megafusion.errors import UserError
from megafusion.parallel.sharding import shard_spec_of

# All that the list of tensors is made of; the tensors themselves are loaded with weights_only.
_ALLOWED = {
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "_MEM_FORMAT_ENCODING",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
        )
    ),
}


def _member(owner: type, name: str) -> object:
    """An enumeration's member, which Python up to 3.11.3 pickles as an attribute of its class."""
    if owner is not _MEM_FORMAT_ENCODING or name not in owner.__members__:
        raise pickle.UnpicklingError(f"it asks for an attribute of {owner!r}")
    return owner[name]


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        if (module, name) == ("builtins", "getattr"):
            return _member
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in _ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint of ours holds")


class Reader(FileSystemReader):
    """torch's reader of a checkpoint's folder, which runs nothing that the folder might ask for."""

    def read_metadata(self, *args: object, **kwargs: object) -> Metadata:
        """The list of tensors. UserError naming the file when it is damaged or holds anything else."""
        path = Path(self.path) / ".metadata"
        try:
            with path.open("rb") as file:
                metadata = _Unpickler(file).load()
        except (OSError, EOFError, ValueError, pickle.UnpicklingError) as error:
            raise DamagedCheckpoint(f"{path}: not read ({error}); {way_out()}") from error
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def read_chunks(
    path: Path, boxes: dict[str, Chunks], shapes: dict[str, torch.Size], kinds: tuple[str, ...]
) -> None:
    """Fill boxes. UserError where the checkpoint is none of ours, or has other tensors of these kinds."""
    reader = Reader(path / "tensors")
    stored = {
        name: entry.size
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if name.partition(".")[0] in kinds
    }
    for name in sorted(stored.keys() | shapes.keys(), key=lambda name: name.partition(".")[::-1]):
        if stored.get(name) != shapes.get(name):
            there, here = (_shape_text(found.get(name)) for found in (stored, shapes))
            parameter = name.partition(".")[2]
            raise UserError(
                f"{path}: does not hold the tensors of this model: {parameter} {there} there, "
                f"{here} here; give the model that it was saved from"
            )
    with warnings.catch_warnings():
        # A rank reads what it needs and no other rank needs to know.
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.load(boxes, storage_reader=reader, planner=ChunkLoadPlanner(), no_dist=True)


def _shape_text(shape: torch.Size | None) -> str:
    return "is missing" if shape is None else f"has shape {list(shape)}"


def load_whole(path: Path, names_and_shapes: dict[str, torch.Size], kind: str) -> dict[str, Tensor]:
    """Whole tensors of one kind (of KINDS) by parameter name, in one process, every file's hash checked.

    Raises UserError where the checkpoint is damaged or of another model.
    """
    verify_checkpoint(path)
    return read_whole(path, names_and_shapes, kind)


def read_whole(path: Path, names_and_shapes: dict[str, torch.Size], kind: str) -> dict[str, Tensor]:
    """The same of a checkpoint that this run has just written or verified."""
    shapes = {f"{kind}.{name}": torch.Size(shape) for name, shape in names_and_shapes.items()}
    tensors = {name: torch.empty(shape) for name, shape in shapes.items()}
    boxes = {name: Chunks(tensor.view(-1), 0, shard_spec_of(tensor)) for name, tensor in tensors.items()}
    read_chunks(path, boxes, shapes, (kind,))
    return {name.partition(".")[2]: tensor for name, tensor in tensors.items()}
