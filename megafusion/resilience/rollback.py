"""What follows from steps that were left out: counts, and when to go back to a checkpoint."""

from megafusion.errors import UserError
from megafusion.resilience.config import HealthConfig
from megafusion.resilience.consensus import StepConsensus


class Rollback:
    """Counts of a run, kept in its checkpoints with the losses that jumps are measured by.

    The same on every rank, for it sees nothing but what was agreed.
    """

    def __init__(self, config: HealthConfig, consensus: StepConsensus):
        self._config, self._agreement = config, consensus
        self.num_skipped = self.num_spikes = self.num_rollbacks = 0
        self._in_a_row = 0
        self._went_back_to: int | None = None

    def record_step(self, step: int) -> str | None:
        """Count the latest step; what is to be said of it, if anything. step: updates made before it."""
        consensus = self._agreement
        self.num_spikes += consensus.is_spike
        self._in_a_row = self._in_a_row + 1 if consensus.is_skipped else 0
        self.num_skipped += consensus.is_skipped
        if not consensus.is_finite:
            found = "the loss or a gradient is not finite"
        elif consensus.is_spike:
            found = "the loss jumps"
        else:
            return None
        text, image, _ = consensus.losses.tolist()
        action = "left out on all ranks, its batch with it" if consensus.is_skipped else "kept"
        return f"step {step + 1}: {found} (text {text:.4g}, image {image:.4g}); {action}"

    @property
    def must_go_back(self) -> bool:
        """Whether so many steps in a row were left out that the weights are to blame."""
        return self._in_a_row >= self._config.roll_back_after

    def go_back(self, state: dict | None) -> int:
        """The run went back to a checkpoint with this state; None where there is none. Returns its step.

        The data is where it was: past what the checkpoint's next steps would read. UserError (status 1)
        without a checkpoint, and where the run went back to the same one before.
        """
        step = state and state["step"]
        if step is not None and step != self._went_back_to:
            self._went_back_to, self._in_a_row = step, 0
            self.num_rollbacks += 1
            self._restore_losses(state.get("health", {}))
            return step
        before = (
            "no checkpoint to go back to" if step is None else f"back to step {step}, which is kept, before"
        )
        error = UserError(
            f"{self._in_a_row} steps in a row had losses or gradients that are not finite, or jumped; "
            f"{before}; start again with a lower optimizer.learning_rate"
        )
        error.on_every_rank, error.exit_status = True, 1
        raise error

    def figures(self) -> dict[str, int]:
        """For a line of metrics."""
        return {
            "skipped_steps": self.num_skipped,
            "loss_spikes": self.num_spikes,
            "rollbacks": self.num_rollbacks,
        }

    def state(self) -> dict:
        """For a checkpoint."""
        return {**self.figures(), "losses": list(self._agreement.spikes.losses)}

    def restore(self, state: dict) -> None:
        """As a run resumes from a checkpoint with this state."""
        health = state.get("health", {})  # none in those of older versions
        self.num_skipped, self.num_spikes = health.get("skipped_steps", 0), health.get("loss_spikes", 0)
        self.num_rollbacks = health.get("rollbacks", 0)
        self._restore_losses(health)

    def _restore_losses(self, health: dict) -> None:
        losses = self._agreement.spikes.losses
        losses.clear()
        losses.extend(health.get("losses", ()))
