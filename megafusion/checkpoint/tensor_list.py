"""A checkpoint's list of tensors, which DCP pickles, read without trusting it; the shapes without torch."""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from megafusion.checkpoint.folder import DamagedCheckpoint, way_out

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

# Every name in the list, by module; tensors are float32, frozen ones perhaps bfloat16, and loaded with
# weights_only.
_ALLOWED = {
    "builtins": "getattr",
    "collections": "OrderedDict",
    "pathlib": "PosixPath",
    "pathlib._local": "PosixPath",
    "torch": "Size float32 bfloat16",
    "torch.serialization": "_get_layout",
    "torch.distributed.checkpoint.filesystem": "_StorageInfo",
    "torch.distributed.checkpoint.metadata": "_MEM_FORMAT_ENCODING ChunkStorageMetadata Metadata "
    "MetadataIndex StorageMeta TensorProperties TensorStorageMetadata",
}


ITEM_BYTES = {"float32": 4, "bfloat16": 2}


class _Record:
    """Stands for any object of torch's: the arguments and the state with which it was pickled."""

    def __init__(self, *arguments: Any):
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    """Refuses every name that no list has. with_torch: make torch's objects, not records in their place."""

    def __init__(self, file: Any, with_torch: bool):
        super().__init__(file)
        self._with_torch = with_torch

    def find_class(self, module: str, name: str) -> Any:
        if name not in _ALLOWED.get(module, "").split():
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint holds")
        if name == "getattr":
            return _member if self._with_torch else _Record
        if name in ITEM_BYTES and not self._with_torch:
            return name
        is_torch = module.partition(".")[0] == "torch"
        return _Record if is_torch and not self._with_torch else super().find_class(module, name)


def _member(owner: type, name: str) -> object:
    """A member of an enumeration: Python up to 3.11.3 pickles it as an attribute of its class."""
    from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

    if owner is not _MEM_FORMAT_ENCODING or name not in owner.__members__:
        raise pickle.UnpicklingError(f"it names an attribute of {owner!r}")
    return owner[name]


def read_tensor_list(checkpoint: Path) -> "Metadata":
    """DCP's own list. DamagedCheckpoint naming the file if it is corrupt or holds anything else."""
    with _opened(checkpoint) as file:
        metadata = _Unpickler(file, with_torch=True).load()
    return metadata


def read_shapes(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors `KIND.PARAMETER`. Raises DamagedCheckpoint."""
    return {name: shape for name, (shape, _) in read_shapes_and_types(checkpoint).items()}


def read_shapes_and_types(checkpoint: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shapes and types, of ITEM_BYTES, of the tensors `KIND.PARAMETER`. Raises DamagedCheckpoint."""
    with _opened(checkpoint) as file:
        entries = _Unpickler(file, with_torch=False).load().state["state_dict_metadata"]
        found = {
            name: (tuple(entry.state["size"].arguments[0]), entry.state["properties"].state[0])
            for name, entry in entries.items()
        }
    return found


@contextmanager
def _opened(checkpoint: Path) -> Iterator[BinaryIO]:
    path = checkpoint / "tensors" / ".metadata"
    try:
        with path.open("rb") as file:
            yield file
    except Exception as error:  # a corrupt pickle raises any
        raise DamagedCheckpoint(f"{path}: damaged: {error}; {way_out(checkpoint)}") from error
