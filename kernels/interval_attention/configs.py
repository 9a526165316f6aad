"""Stored tiles per architecture and head size: nothing is tuned while a model trains.

Chosen as the largest that do not spill in compile_check.py; not measured on a GPU yet.
"""

from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """Rows and keys of a tile, warps of a program, stages of its software pipeline."""

    rows: int
    keys: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    """One tile for each kernel; `decode` is the forward pass of at most 16 query rows."""

    forward: Tile
    decode: Tile
    delta: Tile
    dkdv: Tile
    dq: Tile


HEAD_DIMS = (16, 32, 64, 128, 256)
# 80 also serves other chips of compute capability 8.x and 12.x: its tiles fit in their 99 KiB.
ARCHITECTURES = (80, 90)
_DELTA = Tile(64, 1, 4, 1)

STORED: dict[tuple[int, int], Tiles] = {
    # forward, decode, delta, dkdv, dq
    (80, 16): Tiles(Tile(128, 64, 4, 3), Tile(16, 64, 4, 3), _DELTA, Tile(64, 64, 4, 2), Tile(128, 32, 4, 2)),
    (80, 32): Tiles(Tile(128, 64, 4, 3), Tile(16, 64, 4, 3), _DELTA, Tile(64, 64, 4, 2), Tile(128, 32, 4, 2)),
    (80, 64): Tiles(
        Tile(128, 64, 4, 3), Tile(16, 64, 4, 3), _DELTA, Tile(32, 128, 8, 2), Tile(128, 64, 8, 2)
    ),
    (80, 128): Tiles(
        Tile(128, 64, 8, 3), Tile(16, 64, 4, 2), _DELTA, Tile(64, 64, 8, 2), Tile(128, 32, 8, 2)
    ),
    (80, 256): Tiles(Tile(64, 32, 8, 2), Tile(16, 32, 4, 2), _DELTA, Tile(16, 64, 8, 1), Tile(64, 32, 8, 1)),
    (90, 16): Tiles(Tile(128, 64, 4, 3), Tile(16, 64, 4, 3), _DELTA, Tile(64, 64, 4, 2), Tile(128, 32, 4, 2)),
    (90, 32): Tiles(Tile(128, 64, 4, 3), Tile(16, 64, 4, 3), _DELTA, Tile(64, 64, 4, 2), Tile(128, 32, 4, 2)),
    (90, 64): Tiles(
        Tile(128, 128, 8, 2), Tile(16, 64, 4, 3), _DELTA, Tile(64, 128, 8, 2), Tile(128, 128, 8, 2)
    ),
    (90, 128): Tiles(
        Tile(128, 64, 8, 3), Tile(16, 64, 4, 3), _DELTA, Tile(32, 128, 8, 2), Tile(128, 64, 8, 2)
    ),
    (90, 256): Tiles(Tile(128, 32, 8, 2), Tile(16, 32, 4, 2), _DELTA, Tile(32, 32, 8, 2), Tile(64, 32, 8, 2)),
}

# float32 serves tests and comparisons; the interpreter's tiles are small so that short rows have edges.
_FLOAT32 = Tiles(Tile(32, 32, 4, 1), Tile(16, 32, 4, 1), _DELTA, Tile(32, 32, 4, 1), Tile(32, 32, 4, 1))
_WIDE_FLOAT32 = Tiles(Tile(16, 16, 4, 1), Tile(16, 16, 4, 1), _DELTA, Tile(16, 16, 4, 1), Tile(16, 16, 4, 1))
INTERPRETED = Tiles(
    Tile(32, 16, 1, 1), Tile(16, 32, 1, 1), Tile(32, 1, 1, 1), Tile(16, 32, 1, 1), Tile(32, 16, 1, 1)
)


def stored_tiles(device: torch.device, head_dim: int, dtype: torch.dtype) -> Tiles:
    """The tiles of a device; float32 has its own, and so has the interpreter on a CPU."""
    if device.type == "cpu":
        return INTERPRETED
    if dtype == torch.float32:
        return _WIDE_FLOAT32 if head_dim == 256 else _FLOAT32
    major, _ = torch.cuda.get_device_capability(device)
    return STORED[90 if major in (9, 10) else 80, head_dim]
