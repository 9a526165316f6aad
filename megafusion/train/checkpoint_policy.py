"""When a run saves, what it resumes from, and what it does when the disk fails."""

from collections.abc import Callable

from megafusion.device import default_device

import torch
import torch.distributed as dist

from megafusion.checkpoint.config import CheckpointConfig
from megafusion.checkpoint.folder import DAMAGED, DamagedCheckpoint, complete_checkpoints, quarantine
from megafusion.checkpoint.manager import CheckpointManager, SaveFailed
from megafusion.errors import UserError, refuse_os_errors
from megafusion.parallel.errors import raise_on_all_ranks


class CheckpointPolicy:
    """Saves and loads by the configuration, on every rank at the same steps. say: prints a line on rank 0."""

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
            found = [(complete_checkpoints(self._folder), sorted(self._folder.glob(f"step-*{DAMAGED}")))]
            dist.broadcast_object_list(found)  # what rank 0 sees, because all ranks must load the same
            complete, damaged = found[0]
            if damaged and not complete:
                names = ", ".join(path.name for path in damaged)
                raise UserError(
                    f"{self._folder}: only damaged checkpoints are left ({names}{said}); restore one from a "
                    "backup, under its name without the suffix, or choose another out= to start from scratch",
                    on_every_rank=True,
                )
            if not complete:
                return None
            *others, path = complete
            try:
                state = self._manager.load(path)
            except DamagedCheckpoint as error:
                said = "; " + str(error).partition(";")[0]
            else:
                self._saved = (state["step"], state["data"]["batch_number"])
                return state
            with raise_on_all_ranks(), refuse_os_errors(f"{path}: damaged, and cannot be renamed"):
                if dist.get_rank() == 0:
                    quarantine(path)
            then = "resuming from the previous checkpoint" if others else "it was the last checkpoint"
            self._say(f"{said[2:]}; quarantined as {path.name}{DAMAGED}; {then}")

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

    def wait(self, must_succeed: bool = False, then: str = "training continues") -> None:
        """Wait for the running save. SaveFailed if it failed, unless the run continues then."""
        try:
            self._manager.wait()
        except SaveFailed as error:
            self._saved = None
            self.counts["save_errors"] += 1
            if must_succeed or not self._continues:
                raise
            self._say(f"warning: {error}; {then} (checkpoint.on_save_error)")

    def _is_any_saving(self) -> bool:
        """Whether any rank is still writing: ranks finish at different times, and all must decide alike."""
        saving = torch.tensor([int(self._manager.is_saving)], device=default_device())
        dist.all_reduce(saving, dist.ReduceOp.MAX)
        return bool(saving)
