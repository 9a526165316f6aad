"""How a pipeline is opened from what rooms above this one write, which this room may not import."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megafusion.generate.pipeline import TransfusionPipeline

openers: "list[Callable[[Path], TransfusionPipeline | None]]" = []
"""Tried in order by `TransfusionPipeline.from_pretrained`; None for a path of another kind."""
