"""The seed of dropout, the only thing in a step that samples from torch's global generator."""

import hashlib

import torch

from megafusion.parallel.mesh import Mesh


def seed_dropout(seed: int, batch_number: int, mesh: Mesh) -> None:
    """Seed the global generator for a batch, so that a resumed run drops what an uninterrupted one does.

    Ranks with other rows, positions or layers drop other inputs; tensor ranks, whose inputs may be the same,
    drop the same. seed: of the run.
    """
    where = [mesh.rank(axis) for axis in ("pipeline", "data", "ulysses")]
    digest = hashlib.sha256(f"dropout {seed} {batch_number} {where}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
