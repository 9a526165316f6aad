"""Counts of skipped steps, and the decision to roll back to a checkpoint."""

from megafusion.errors import ExitStatus, UserError
from megafusion.resilience.config import ResilienceConfig
from megafusion.resilience.consensus import StepConsensus


class Rollback:
    """Counts skipped steps, spikes and rollbacks, which checkpoints hold. Every rank has the same counts."""

    def __init__(self, config: ResilienceConfig, consensus: StepConsensus):
        self._max_in_a_row, self._consensus = config.roll_back_after, consensus
        self.counts = {"skipped_steps": 0, "loss_spikes": 0, "rollbacks": 0}
        """Since the run began, as in a line of metrics."""
        self._in_a_row = 0
        self._last_rollback: int | None = None
        """Step of the checkpoint that the run last rolled back to."""

    def record_step(self, step: int) -> str | None:
        """Count the latest step; returns a message about a bad one. step: updates before it."""
        consensus = self._consensus
        self.counts["loss_spikes"] += consensus.is_spike
        self.counts["skipped_steps"] += consensus.is_skipped
        self._in_a_row = self._in_a_row + 1 if consensus.is_skipped else 0
        if not consensus.is_finite:
            found = "the loss or a gradient contains NaN or Inf"
        elif consensus.is_spike:
            found = "loss spike"
        else:
            return None
        text, image, *_ = consensus.losses.tolist()
        action = "skipped on all ranks, with its batch" if consensus.is_skipped else "kept"
        return f"step {step + 1}: {found} (text {text:.4g}, image {image:.4g}); {action}"

    @property
    def is_due(self) -> bool:
        """Whether so many consecutive steps were skipped that the weights must be bad."""
        return self._in_a_row >= self._max_in_a_row

    @property
    def may_be_due(self) -> bool:
        """Whether a rollback is due if the next step is skipped."""
        return self._in_a_row + 1 >= self._max_in_a_row

    def roll_back(self, state: dict | None) -> int:
        """Record a rollback to a checkpoint and return its step. state: the checkpoint's; None without one.

        The data is not rolled back, so the run skips the data since the checkpoint. Raises UserError (FAILED)
        without a checkpoint, or if the last rollback was to the same one.
        """
        step = None if state is None else int(state["step"])
        if state is not None and step is not None and step != self._last_rollback:
            self._last_rollback, self._in_a_row = step, 0
            self.counts["rollbacks"] += 1
            self._restore_losses(state.get("health", {}))
            return step
        reason = (
            "there is no checkpoint to roll back to"
            if step is None
            else f"the run rolled back to step {step}, which is kept, before"
        )
        raise UserError(
            f"{self._in_a_row} consecutive steps had NaN, Inf or a loss spike, and {reason}; start again "
            "with a lower optimizer.learning_rate",
            on_every_rank=True,
            exit_status=ExitStatus.FAILED,
        )

    def state_dict(self) -> dict:
        """State of a checkpoint, where its key is "health"."""
        return {**self.counts, "losses": list(self._consensus.spikes.losses)}

    def load_state_dict(self, state: dict) -> None:
        """Restore the counts and losses of `state_dict`, or of {} for a checkpoint that has none."""
        self.counts = {name: state.get(name, 0) for name in self.counts}
        self._restore_losses(state)

    def _restore_losses(self, state: dict) -> None:
        losses = self._consensus.spikes.losses
        losses.clear()
        losses.extend(state.get("losses", ()))
