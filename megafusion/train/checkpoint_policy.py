"""When a run saves, what it resumes from, and what it does when the disk fails."""

from collections.abc import Callable

from megafusion.device import default_device

import torch
import torch.distributed as dist

from megafusion.checkpoint.config import CheckpointConfig
from megafusion.checkpoint.folder import DAMAGED, DamagedCheckpoint, complete_checkpoints, quarantine
from megafusion.checkpoint.manager import CheckpointManager, SaveFailed
from megafusion.errors import UserError
from megafusion.parallel.errors import raise_on_all_ranks


class CheckpointPolicy:
    """Saves and loads by the configuration. Called by every rank at the same steps.

    say: prints a line, on rank 0.
    """

    def __init__(self, config: CheckpointConfig, manager: CheckpointManager, say: Callable[[str], None]):
        self._folder, self._manager, self._say = manager.folder, manager, say
        self._continues = config.on_save_error == "continue"
        self.counts = {"save_errors": 0, "saves_skipped": 0}
        """Failed saves, and saves skipped because the previous one was still being written."""
        self._saved: tuple[int, int] | None = None
        """Step and batches read of the latest save: a skipped step advances the data only."""

    def load_latest(self) -> dict | None:
        """Load the latest undamaged checkpoint; returns its state, or None if the run has no checkpoint.

        Damaged ones are quarantined as `step-*.damaged`. UserError if all are damaged, now or from before: a
        trained run must not silently start from scratch.
        """
        said = ""
        while True:
            complete = complete_checkpoints(self._folder)
            damaged = sorted(path.name for path in self._folder.glob(f"step-*{DAMAGED}"))
            found = [(complete[-1] if complete else None, len(complete) > 1, damaged)]
            dist.broadcast_object_list(found)  # what rank 0 sees, because all ranks must load the same
            path, has_another, damaged = found[0]
            if path is None and damaged:
                raise UserError(
                    f"{self._folder}: only damaged checkpoints are left ({', '.join(damaged)}{said}); "
                    "restore one from a backup, under its name without the suffix, or choose another out= "
                    "to start from scratch",
                    on_every_rank=True,
                )
            if path is None:
                return None
            try:
                state = self._manager.load(path)
            except DamagedCheckpoint as error:
                said = "; " + str(error).partition(";")[0]
            else:
                self._saved = (state["step"], state["data"]["batch_number"])
                return state
            quarantined = None
            with raise_on_all_ranks():
                if dist.get_rank() == 0:
                    try:
                        quarantined = quarantine(path)
                    except OSError as error:
                        raise UserError(
                            f"{path}: damaged, and cannot be renamed ({error.strerror or error})"
                        ) from error
            then = "resuming from the previous checkpoint" if has_another else "it was the last checkpoint"
            self._say(f"{said[2:]}; quarantined as {quarantined}; {then}")

    def save(self, state: dict, stream_state: dict, is_last: bool = False) -> None:
        """Begin to save, unless this state is saved already. The last save is never skipped.

        Raises SaveFailed on every rank if the previous save failed, unless the run continues then.
        """
        now = (state["step"], stream_state["batch_number"])
        if self._saved == now:
            return
        if self._continues and not is_last and self._is_any_saving():
            self.counts["saves_skipped"] += 1
            self._say(f"step {state['step']}: save skipped, because the previous one is still being written")
            return
        self.wait()
        self._manager.save(state, stream_state)
        self._saved = now

    def wait(self, must_succeed: bool = False) -> None:
        """Wait for the running save. SaveFailed if it failed, unless the run continues then."""
        try:
            self._manager.wait()
        except SaveFailed as error:
            self._saved = None
            self.counts["save_errors"] += 1
            if must_succeed or not self._continues:
                raise
            self._say(f"warning: {error}; training continues (checkpoint.on_save_error)")

    def _is_any_saving(self) -> bool:
        """Whether any rank is still writing: ranks finish at different times, and all must decide alike."""
        saving = torch.tensor([int(self._manager.is_saving)], device=default_device())
        dist.all_reduce(saving, dist.ReduceOp.MAX)
        return bool(saving)
