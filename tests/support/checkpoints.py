"""The contents of a checkpoint, in whole tensors."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from megafusion.checkpoint.folder import verify_checkpoint
from megafusion.checkpoint.reader import CheckpointWeights, fill_tensors


def load_full_tensors(path: Path, shapes: Mapping[str, torch.Size], kind: str) -> dict[str, Tensor]:
    """Whole tensors of one kind by parameter name."""
    verify_checkpoint(path)
    tensors = {name: torch.full(shape, torch.nan) for name, shape in shapes.items()}
    fill_tensors(CheckpointWeights(path, kind), tensors)
    return tensors
