"""What all ranks decide together: to refuse, to make a step's update or leave it out, to stop after it.

A step has two small sums over all ranks. Text targets and images, which the losses need, carry the wish to
stop and what one rank alone cannot go on with: a bad shard, a full disk. They are summed on the host, which
must not begin a step that a rank refuses. The losses carry whether every rank's gradients are numbers. Each
rank decides from the same sums, so all decide alike.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from megafusion.errors import UserError
from megafusion.parallel.errors import raise_on_all_ranks
from megafusion.parallel.mesh import Mesh
from megafusion.resilience.spikes import Spikes


class StepConsensus:
    """One rank's side. `wants_stop` is its wish; the rest says what was agreed about the latest step."""

    def __init__(self, mesh: Mesh, device: torch.device, spikes: Spikes):
        self.wants_stop = self.stops = False
        """Whether this rank wishes to stop; whether any did as the latest step began."""
        self.spikes = spikes
        self.losses = torch.zeros(3, device=device)
        """float32 [3], on the device: text, image and total of the global batch."""
        self.is_finite, self.is_spike = True, False
        speaks_for_rows = mesh.rank("tensor") == mesh.rank("ulysses") == 0
        self._counts_rows = speaks_for_rows and mesh.is_first
        self._counts_losses = speaks_for_rows and mesh.is_last
        self._device = device
        self._shares: list[Tensor] = []
        self._refused: UserError | None = None
        self._hosts = dist.new_group(backend="gloo")

    @property
    def is_skipped(self) -> bool:
        """Whether the update was left out, on every rank."""
        return not self.is_finite or (self.is_spike and self.spikes.action == "skip")

    @contextmanager
    def defer_errors(self) -> Iterator[None]:
        """What this rank alone refuses in this block, all refuse as the next step begins, or in `settle`."""
        try:
            yield
        except UserError as error:
            self._refused = self._refused or error

    def settle(self) -> None:
        """Raise on every rank what any has refused."""
        with raise_on_all_ranks(self._hosts):
            if self._refused:
                raise self._refused

    def share_counts(self, counts: Tensor | int) -> Tensor:
        """int64 [2]: text targets and images of this rank's rows, or 0; those of the global batch.

        Raises UserError on every rank where one has refused.
        """
        self._shares = []
        sums = torch.zeros(4, dtype=torch.int64)
        if self._counts_rows:
            sums[:2] = counts
        sums[2], sums[3] = self.wants_stop, self._refused is not None
        dist.all_reduce(sums, group=self._hosts)
        self.stops = bool(sums[2])
        if sums[3]:
            self.settle()
        return sums[:2].to(self._device, non_blocking=True)

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
