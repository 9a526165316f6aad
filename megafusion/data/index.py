"""The index of a shard: int64 [n + 1] offsets, so that each of its n documents is one read away."""

import io
import mmap
from pathlib import Path

import numpy as np

from megafusion.data.document_format import BLOCK, tar_members
from megafusion.data.manifest import ShardEntry
from megafusion.errors import UserError

INDEX = ".index.npy"


def document_offsets(path: Path) -> np.ndarray:
    """The index that a shard's bytes give: where each document starts, and where the last one ends.

    Raises CorruptBytes if the file is not a tar of plain files. Reads only the headers.
    """
    offsets, previous, end = [], None, 0
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for member in tar_members(content):
            key = member.name.partition(".")[0]
            if key != previous:
                offsets.append(member.header)
                previous = key
            end = member.start + -(-member.size // BLOCK) * BLOCK
    return np.array([*offsets, end], np.int64)


def load_index(index: Path, entry: ShardEntry, shard: Path | str) -> np.ndarray:
    """A shard's index, memory-mapped. Raises UserError if it is not the index of that shard."""
    try:
        offsets = np.load(index, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{index}: not a readable index ({error}); preprocess again") from error
    if (
        offsets.dtype != np.int64
        or offsets.shape != (entry.num_documents + 1,)
        or offsets[0] != 0
        or offsets[-1] > entry.num_bytes
        or (np.diff(offsets) <= 0).any()
    ):
        raise UserError(f"{index}: is not the index of {shard}; preprocess again")
    return offsets


def npy(array: np.ndarray) -> bytes:
    """The bytes of an npy file."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()
