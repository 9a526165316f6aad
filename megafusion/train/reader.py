"""Reading a checkpoint without trusting it: torch pickles the list of its tensors."""

import pickle
from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata, StorageMeta

from megafusion.errors import UserError

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
            raise UserError(
                f"{path}: not read ({error}); delete {path.parents[1]} to go on from the one before"
            ) from error
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata
