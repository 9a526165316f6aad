"""When a run saves, from what it resumes, and what it does where a disk refuses."""

from collections.abc import Callable

import torch
import torch.distributed as dist

from megafusion.checkpoint.folder import DAMAGED, DamagedCheckpoint, complete_checkpoints, quarantine
from megafusion.checkpoint.manager import CheckpointManager, SaveFailed
from megafusion.engine.engine import Engine
from megafusion.errors import UserError
from megafusion.parallel.errors import raise_on_all_ranks
from megafusion.train.config import RunConfig


class CheckpointPolicy:
    """A run's checkpoints under its policy. Called by every rank at the same steps.

    say: prints a line, on rank 0. `num_errors` counts what could not be written, `num_late` what was left out
    because the disk was still busy.
    """

    def __init__(
        self, config: RunConfig, checkpointer: CheckpointManager, engine: Engine, say: Callable[[str], None]
    ):
        self._checkpointer, self._device, self.say = checkpointer, engine.device, say
        self._folder = config.out / "checkpoints"
        self._goes_on = config.train.on_save_error == "continue"
        self.num_errors = self.num_late = 0
        self._saved: tuple[int, int] | None = None
        """Step, and batches read, of what was saved last: a step that is left out moves the data alone."""

    def load_newest(self) -> dict | None:
        """Put the newest sound checkpoint in place; its plain state, or None where the run has none yet.

        A damaged one is said and set aside as `step-*.damaged`. UserError where all are, now or before: a run
        that was trained must not begin anew without a word.
        """
        said = ""
        while True:
            complete = complete_checkpoints(self._folder)
            damaged = sorted(path.name for path in self._folder.glob(f"step-*{DAMAGED}"))
            found = [(complete[-1] if complete else None, len(complete) > 1, damaged)]
            dist.broadcast_object_list(found)  # as rank 0 sees it: all ranks must load the same
            path, has_another, damaged = found[0]
            if path is None and damaged:
                error = UserError(
                    f"{self._folder}: only damaged checkpoints are left ({', '.join(damaged)}{said}); bring "
                    "one back from a copy, under its name without the ending, or begin anew in another out="
                )
                error.on_every_rank = True
                raise error
            if path is None:
                return None
            try:
                state = self._checkpointer.load(path)
            except DamagedCheckpoint as error:
                said = "; " + str(error).partition(";")[0]
            else:
                self._saved = (state["step"], state["data"]["batch_number"])
                return state
            aside = None
            with raise_on_all_ranks():
                if dist.get_rank() == 0:
                    try:
                        aside = quarantine(path)
                    except OSError as error:
                        raise UserError(
                            f"{path}: damaged, and cannot be set aside ({error.strerror or error})"
                        ) from error
            then = "the run goes on from the checkpoint before" if has_another else "it was the last one"
            self.say(f"{said[2:]}; kept as {aside}, {then}")

    def save(self, state: dict, stream_state: dict, is_last: bool = False) -> None:
        """Begin to save, unless this has been saved. The last is not left out; `settle` waits for it.

        Raises SaveFailed on every rank where the save before failed, unless the run goes on then.
        """
        now = (state["step"], stream_state["batch_number"])
        if self._saved == now:
            return
        if self._goes_on and not is_last and self._is_any_saving():
            self.num_late += 1
            self.say(f"step {state['step']}: no checkpoint, for the one before is still being written")
            return
        self.settle()
        self._checkpointer.save(state, stream_state)
        self._saved = now

    def settle(self, must: bool = False) -> None:
        """Wait for the save under way; SaveFailed if it must be written or the run stops, else it is said."""
        try:
            self._checkpointer.wait()
        except SaveFailed as error:
            self._saved = None
            self.num_errors += 1
            if must or not self._goes_on:
                raise
            self.say(f"warning: {error}; training goes on (train.on_save_error)")

    def figures(self) -> dict[str, int]:
        """For a line of metrics."""
        return {"save_errors": self.num_errors, "saves_left_out": self.num_late}

    def _is_any_saving(self) -> bool:
        """Whether any rank still writes: they end one after another, and all must do the same."""
        busy = torch.tensor([int(self._checkpointer.is_saving)], device=self._device)
        dist.all_reduce(busy, dist.ReduceOp.MAX)
        return bool(busy)
