"""Decisions of a step that all ranks make together: raise a UserError, skip the update, stop after the step.

A step has two small all-reduces over all ranks. The first has the counts of text targets and images, which
the losses need, and with them each rank's stop request and whether it has an error of its own, such as a bad
shard or a full disk. It runs on the host over gloo, because no rank may begin a step that another rank
refuses. The second has the losses and the gradients' squared norm, which show whether every rank's gradients
are finite. Every rank decides from the same sums, so all decide alike.

The second stays on the device, where the update obeys it, and reaches the host through pinned memory, so that
the host does not wait for it: it reads the outcome when it has given the device the next step's work.
"""

import math
import statistics
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from megafusion.errors import UserError
from megafusion.objective.losses import NUM_SUMS, Losses
from megafusion.parallel.errors import raise_on_all_ranks
from megafusion.parallel.mesh import Mesh
from megafusion.resilience.config import ResilienceConfig

WINDOW, MIN_LOSSES = 128, 32
MIN_RELATIVE_DEVIATION = 0.01
"""Lower bound of the standard deviation, as a fraction of the mean: without it any change of a flat loss
would be a spike."""


class SpikeDetector:
    """The latest losses of steps that were not skipped, and whether the next one is a spike.

    Checkpoints hold the losses, so a resumed run decides as an uninterrupted one.
    """

    def __init__(self, config: ResilienceConfig):
        self.action, self._sigmas = config.spikes, config.spike_sigmas
        self.losses: deque[float] = deque(maxlen=WINDOW)

    def is_spike(self, loss: float) -> bool:
        """Whether a finite loss is more than `spike_sigmas` deviations above the mean of the window."""
        if self.action == "off" or len(self.losses) < MIN_LOSSES:
            return False
        mean = statistics.fmean(self.losses)
        deviation = max(statistics.pstdev(self.losses, mean), MIN_RELATIVE_DEVIATION * abs(mean))
        return loss > mean + self._sigmas * deviation

    def add(self, loss: float) -> None:
        """Add the loss of a step that was not skipped."""
        if self.action != "off":
            self.losses.append(loss)


class StepConsensus:
    """One rank's requests (`wants_stop`, deferred errors), and the decisions about the latest step."""

    def __init__(self, mesh: Mesh, device: torch.device, spikes: SpikeDetector):
        self.wants_stop = self.stops = False
        """Whether this rank requests a stop; whether any rank did when the latest step began."""
        self.spikes = spikes
        self.losses = torch.zeros(len(Losses._fields), device=device)
        """float32, on the device: `Losses` of the global batch."""
        self.found_inf, self.grad_norm = torch.zeros((), device=device), torch.zeros((), device=device)
        """float32 [], on the device: 1 if the latest update was skipped, else 0; the global gradient norm."""
        on_gpu = device.type == "cuda"
        self._sums = torch.zeros(len(self.losses) + 1, pin_memory=on_gpu)
        self._copied = torch.cuda.Event() if on_gpu else None
        self._is_read, self._is_finite, self._is_spike = True, True, False
        # Tensor and Ulysses ranks compute the same rows; one of them adds these to the sums.
        is_leader = mesh.rank("tensor") == mesh.rank("ulysses") == 0
        self._adds_counts = is_leader and mesh.rank("pipeline") == 0
        self._adds_losses = is_leader and mesh.rank("pipeline") == mesh.size("pipeline") - 1
        self.device = device
        self._micro_batch_losses: list[Tensor] = []
        self._micro_batch_sums: list[Tensor] = []
        self._error: UserError | None = None
        self._host_group = dist.new_group(backend="gloo")

    @property
    def is_finite(self) -> bool:
        """Whether every rank's losses and gradients were finite. Waits for the device, as the next two do."""
        self._read()
        return self._is_finite

    @property
    def is_spike(self) -> bool:
        """Whether the loss was a spike."""
        self._read()
        return self._is_spike

    @property
    def is_skipped(self) -> bool:
        """Whether the update was skipped, on every rank."""
        return not self.is_finite or (self.is_spike and self.spikes.action == "skip")

    @contextmanager
    def defer_errors(self) -> Iterator[None]:
        """Keep a UserError of the block until the next step or `raise_deferred`, where all ranks raise it."""
        try:
            yield
        except UserError as error:
            self._error = self._error or error

    def raise_deferred(self) -> None:
        """Raise on every rank the first deferred error of any rank."""
        with raise_on_all_ranks(self._host_group):
            if self._error:
                raise self._error

    def reduce_counts(self, counts: Tensor | int) -> Tensor:
        """Sum the counts of text targets and images over the global batch.

        counts: int64 [2], of this rank's rows; 0 without any. Returns int64 [2] on the device. Raises
        UserError on every rank if any rank has deferred one.
        """
        self._micro_batch_losses = []
        sums = torch.zeros(4, dtype=torch.int64)
        if self._adds_counts:
            sums[:2] = counts
        sums[2], sums[3] = self.wants_stop, self._error is not None
        dist.all_reduce(sums, group=self._host_group)
        self.stops = bool(sums[2])
        if sums[3]:
            self.raise_deferred()
        return sums[:2].to(self.device, non_blocking=True)

    def add_losses(self, losses: Iterable[Tensor]) -> None:
        """Add a micro-batch's `Losses` to those of the step."""
        self._micro_batch_losses.append(torch.stack([loss.detach().float() for loss in losses]))

    def add_sums(self, sums: Tensor) -> None:
        """Add a micro-batch's `Objective.sums` to those of a validation."""
        self._micro_batch_sums.append(sums)

    def reduce_sums(self) -> list[float]:
        """The sums of a validation over the micro-batches of all ranks."""
        sums = torch.zeros(NUM_SUMS, dtype=torch.float64, device=self.device)
        if self._adds_losses:
            sums += torch.stack(self._micro_batch_sums).sum(0)
        self._micro_batch_sums = []
        dist.all_reduce(sums)
        return sums.tolist()

    def decide(self, square_norm: Tensor) -> None:
        """Decide on the update, on the device: the host reads the outcome when it needs it.

        square_norm: sum of the squares of the gradients that this rank counts, 0-dim float32, not finite if
        any that it holds is not. Beyond float32 the sum over ranks counts as not finite: such gradients
        cannot be clipped.
        """
        self._read()
        sums = torch.zeros(len(self._sums), device=self.device)
        if self._micro_batch_losses:
            losses = torch.stack(self._micro_batch_losses).sum(0)
            # A rank that does not add its losses still adds NaN if they are not finite.
            sums[:-1] = losses if self._adds_losses else losses - losses
        sums[-1] = square_norm
        dist.all_reduce(sums)
        self.losses, self.grad_norm = sums[:-1], sums[-1].sqrt()
        self.found_inf = (~torch.isfinite(sums).all()).float()
        self._sums.copy_(sums, non_blocking=True)
        if self._copied:
            self._copied.record()
        self._is_read = False
        if self.spikes.action == "skip":
            # Whether a loss is a spike is decided on the host, for which the device waits.
            self.found_inf = self.found_inf.clamp(min=float(self.is_skipped))

    def _read(self) -> None:
        """Read the outcome of the latest step, waiting for the device if it is not there yet."""
        if self._is_read:
            return
        self._is_read = True
        if self._copied:
            self._copied.synchronize()
        values = self._sums.tolist()
        self._is_finite = all(map(math.isfinite, values))
        total = values[Losses._fields.index("total")]
        self._is_spike = self._is_finite and self.spikes.is_spike(total)
        if not self.is_skipped:
            self.spikes.add(total)
