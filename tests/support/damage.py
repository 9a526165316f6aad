"""Damage to shards, in place."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np


def damage(folder: Path, documents: Iterable[int], per_shard: int = 16) -> None:
    """Overwrite the names of some documents' first members."""
    for document in documents:
        path = folder / f"shard-{document // per_shard:06d}.tar"
        offsets = np.load(path.with_suffix(".index.npy"))
        with path.open("r+b") as file:
            file.seek(int(offsets[document % per_shard]))
            file.write(b"\xff\xff")
