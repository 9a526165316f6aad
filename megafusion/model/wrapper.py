"""Modules around modules, whose parameters keep the names that they have in the whole model."""

import re

from torch import nn


class Wrapper(nn.Module):
    """A module around another, as torch's FSDP and CheckpointWrapper."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self._wrapped_module = module


def canonical_name(name: str) -> str:
    """A parameter's name without the levels of wrappers, torch's too: its name in checkpoints."""
    return re.sub(r"_(checkpoint_)?wrapped_module\.", "", name)
