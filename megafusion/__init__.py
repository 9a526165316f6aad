"""MegaFusion: one transformer that writes text and draws images."""

from pathlib import Path
from typing import TYPE_CHECKING

from megafusion.generate.openers import openers

if TYPE_CHECKING:
    from megafusion.generate.pipeline import TransfusionPipeline

__version__ = "0.2.0.dev0"


def __getattr__(name: str) -> object:
    """TransfusionPipeline, imported when it is asked for: the command's help needs no torch."""
    if name == "TransfusionPipeline":
        from megafusion.generate.pipeline import TransfusionPipeline

        return TransfusionPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _open_run(path: Path) -> "TransfusionPipeline | None":
    from megafusion.train.open_model import open_run

    return open_run(path)


openers.append(_open_run)
