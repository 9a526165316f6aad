"""What all ranks decide together about a step: whether its update is made, whether the run stops after it.

Two small sums over all ranks: text targets and images, which the losses need, carry the wish to stop; the
losses carry whether every rank's gradients are numbers. Each rank decides from the same sums, so all decide
alike.
"""

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from megafusion.health.spikes import Spikes
from megafusion.parallel.topology import Topology


class Agreement:
    """One rank's side. `wants_stop` is its wish; the rest says what was agreed about the latest step."""

    def __init__(self, topology: Topology, device: torch.device, spikes: Spikes):
        self.wants_stop = False
        self.spikes = spikes
        self.losses = torch.zeros(3, device=device)
        """float32 [3], on the device: text, image and total of the global batch."""
        self.is_finite, self.is_spike = True, False
        speaks_for_rows = topology.place("tensor") == topology.place("ulysses") == 0
        self._counts_rows = speaks_for_rows and topology.is_first
        self._counts_losses = speaks_for_rows and topology.is_last
        self._device = device
        self._shares: list[Tensor] = []
        self._wishes: Tensor | None = None
        self._wishes_are_here = torch.cuda.Event() if device.type == "cuda" else None

    @property
    def is_skipped(self) -> bool:
        """Whether the update was left out, on every rank."""
        return not self.is_finite or (self.is_spike and self.spikes.action == "skip")

    def share_counts(self, counts: Tensor) -> Tensor:
        """int64 [2]: text targets and images of this rank's rows; returns those of the global batch."""
        self._shares = []
        sums = torch.zeros(3, dtype=torch.int64)
        if self._counts_rows:
            sums[:2] = counts
        sums[2] = self.wants_stop
        sums = sums.to(self._device)
        dist.all_reduce(sums)
        # Copied now and looked at when the step is under way, for which the host would otherwise wait.
        self._wishes = sums[2].to("cpu", non_blocking=True)
        if self._wishes_are_here:
            self._wishes_are_here.record()
        return sums[:2]

    def stops(self) -> bool:
        """Whether any rank wished to stop as the latest step began."""
        if self._wishes_are_here:
            self._wishes_are_here.synchronize()
        return self._wishes is not None and bool(self._wishes)

    def add_share(self, losses: Iterable[Tensor]) -> None:
        """A micro-batch's share of the step's losses: text, image, total."""
        self._shares.append(torch.stack([loss.detach().float() for loss in losses]))

    def decide(self, gradients: list[Tensor]) -> None:
        """Agree on the update that these gradients, all that this rank holds, would make.

        A square that is too large for float32 counts as no number: neither could be clipped.
        """
        sums = torch.zeros(4, device=self._device)
        if self._shares:
            losses = torch.stack(self._shares).sum(0)
            # Ranks that compute the same rows say only whether theirs are numbers.
            sums[:3] = losses if self._counts_losses else losses - losses
        if gradients:
            norms = torch.stack([norm.float() for norm in torch._foreach_norm(gradients)])
            sums[3] = norms.square().sum()
        dist.all_reduce(sums)
        self.losses = sums[:3]
        values = sums.tolist()
        self.is_finite = all(map(math.isfinite, values))
        self.is_spike = self.is_finite and self.spikes.is_spike(values[2])
        if not self.is_skipped:
            self.spikes.add(values[2])
