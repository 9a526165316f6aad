"""Tiles per architecture, head_dim and number of rows, from stored_tiles.json: none is tuned at run time."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """Rows and keys of a tile, warps per program, stages of its software pipeline, and whether its loop
    loads through TMA descriptors (sm_90 and above)."""

    rows: int
    keys: int
    warps: int
    stages: int
    tma: bool = False


class Tiles(NamedTuple):
    """One tile per kernel; `decode` is the forward pass of at most 16 query rows."""

    forward: Tile
    decode: Tile
    delta: Tile
    dkdv: Tile
    dq: Tile


HEAD_DIMS = (16, 32, 64, 128, 256)
# 80 also serves other chips of compute capability 8.x and 12.x: its tiles fit in their 99 KiB.
ARCHITECTURES = (80, 90)
STORED = Path(__file__).with_name("stored_tiles.json")
_DELTA = Tile(64, 1, 4, 1)
# float32 serves tests and comparisons; the interpreter's tiles are small so that short rows have edges too.
_FLOAT32 = Tiles(Tile(32, 32, 4, 1), Tile(16, 32, 4, 1), _DELTA, Tile(32, 32, 4, 1), Tile(32, 32, 4, 1))
_WIDE_FLOAT32 = Tiles(Tile(16, 16, 4, 1), Tile(16, 16, 4, 1), _DELTA, Tile(16, 16, 4, 1), Tile(16, 16, 4, 1))
INTERPRETED = Tiles(
    Tile(32, 16, 1, 1), Tile(16, 32, 1, 1), Tile(32, 1, 1, 1), Tile(16, 32, 1, 1), Tile(32, 16, 1, 1)
)


def stored_tiles(device: torch.device, head_dim: int, dtype: torch.dtype, num_rows: int) -> Tiles:
    """The tiles for num_rows query rows. float32 and the interpreter on a CPU have tiles of their own."""
    if _in_use is not None:
        return _in_use
    if device.type == "cpu":
        return INTERPRETED
    if dtype == torch.float32:
        return _WIDE_FLOAT32 if head_dim == 256 else _FLOAT32
    return lookup(architecture_of(device), head_dim, num_rows)


def architecture_of(device: torch.device) -> int:
    """The entry of ARCHITECTURES whose tiles a CUDA device uses."""
    major, _ = torch.cuda.get_device_capability(device)
    return 90 if major in (9, 10) else 80


def lookup(architecture: int, head_dim: int, num_rows: int) -> Tiles:
    """The stored tiles with the largest min_rows <= num_rows."""
    entries = read_stored()[architecture, head_dim]
    return entries[max(min_rows for min_rows in entries if min_rows <= num_rows)]


@cache
def read_stored() -> dict[tuple[int, int], dict[int, Tiles]]:
    """The stored tiles by (architecture, head_dim), then by min_rows; each has an entry for 0."""
    stored: dict[tuple[int, int], dict[int, Tiles]] = {}
    for entry in json.loads(STORED.read_text())["tiles"]:
        tiles = Tiles(*(Tile(*entry[kernel]) for kernel in Tiles._fields))
        stored.setdefault((entry["architecture"], entry["head_dim"]), {})[entry["min_rows"]] = tiles
    return stored


_in_use: Tiles | None = None


@contextmanager
def using(tiles: Tiles) -> Iterator[None]:
    """Override the stored tiles inside the block, for measurements and tests."""
    global _in_use
    before, _in_use = _in_use, tiles
    try:
        yield
    finally:
        _in_use = before
