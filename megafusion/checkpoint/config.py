"""How often a run is saved, and which checkpoints it keeps."""

from typing import Literal

from pydantic import Field

from megafusion.config import Config


class CheckpointConfig(Config):
    """When to save, what to keep, and what to do if a save fails."""

    every: int = Field(1000, gt=0)
    """Steps between two checkpoints; the last step is always saved."""
    keep_last: int = Field(2, gt=0)
    """Number of latest checkpoints to keep; older ones are deleted once a newer one is complete."""
    keep_every: int = Field(0, ge=0)
    """Checkpoints of steps that are a multiple of this are never deleted; 0 for none."""
    keep_best: bool = False
    """Never delete the checkpoint with the lowest validation_loss; needs data.validation, measured at steps
    that are saved."""
    on_save_error: Literal["stop", "continue"] = "stop"
    """If a checkpoint cannot be written: stop; or continue, count it, and skip a save while the disk is still
    busy with the one before. The last checkpoint of a run is waited for in both cases."""
