"""The training loop and its step; `Run` handles resuming, saving, signals, hangs, bad steps, full disks."""

from megafusion.engine.ema import EmaUpdate
from megafusion.engine.engine import Engine
from megafusion.engine.optimizer import learning_rate
from megafusion.objective.losses import Losses
from megafusion.resilience.signals import StopSignals
from megafusion.sequence.packing import PackedBatch
from megafusion.train.config import RunConfig
from megafusion.train.run import Outcome, Run


def train(config: RunConfig, stop_after: int | None = None, signals: StopSignals | None = None) -> Outcome:
    """Train a model, resuming from the latest checkpoint of the run folder if there is one.

    stop_after: step of the run after which this attempt ends, with a checkpoint. signals: stop requests; all
    ranks then finish the step, save and return "preempted". Called by every rank. Raises UserError before the
    first step if configuration, data, devices and run folder do not fit together.
    """
    run = Run(config, stop_after, signals or StopSignals())
    with run.attempt():
        for _ in run.steps():
            micro_batches = run.next_batch()
            run.engine.forward_backward(micro_batches)
            run.confirm_step()  # the one before: skipped after all for NaN, Inf or a spike, or an update?
            rate = learning_rate(run.step, config.train.num_steps, config.optimizer)
            losses = run.engine.clip_and_step(rate, run.average())
            run.complete_step(losses, rate)  # log, save and sample when due
    return run.outcome


def train_step(
    engine: Engine,
    micro_batches: list[PackedBatch],
    learning_rate: float,
    average: EmaUpdate | None = None,
) -> Losses:
    """Make one update of the weights; returns the losses of the global batch, on the device."""
    engine.forward_backward(micro_batches)  # accumulates, and reduces over ranks; 1F1B with a pipeline
    return engine.clip_and_step(learning_rate, average)  # unless any rank's loss or gradient is not finite
