"""The emoji pack and lists of its keys, as the builders read them."""

from collections.abc import Collection
from pathlib import Path

from data_prep.readers.records import RawPair
from data_prep.readers.webdataset import tar_pairs
from megafusion.errors import UserError
from megafusion.storage import read_lines


def read_pack(pack: Path) -> dict[str, RawPair]:
    """Pairs by key, in the order of a webdataset tar. UserError if there is no such file."""
    if not pack.is_file():
        raise UserError(f"{pack}: no such file; build it with python -m data_prep.emoji.build")
    return {pair.key: pair for pair in tar_pairs(pack)}


def read_keys(path: Path, pack_keys: Collection[str]) -> list[str]:
    """Keys of a file, one per line; UserError naming those that the pack lacks."""
    keys = read_lines(path)
    if missing := [key for key in keys if key not in pack_keys]:
        raise UserError(f"{path}: not in the pack: {missing[:5]}")
    return keys
