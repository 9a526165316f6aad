"""The update of the weights, in place of DeepSpeed's: norm, clipping, AdamW, average, and whether to skip.

The host reads nothing from the device. Whether the update is skipped is decided there (`StepConsensus`), and
AdamW obeys through `found_inf`, as torch's gradient scalers make it do. DeepSpeed keeps what comes before and
after: the layout of the storages, the reduction of gradients at ZeRO 0, at ZeRO 3 and with offload, and the
exchange of weights.
"""

import megafusion.device  # noqa: F401 - before deepspeed

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor
from torch.optim.adamw import adamw

from megafusion.engine.ema import EmaUpdate
from megafusion.engine.gradients import make_gradients
from megafusion.engine.optimizer_state import OptimizerState, Storage
from megafusion.parallel.mesh import Mesh
from megafusion.resilience.consensus import StepConsensus


class Update:
    """Clips and updates, or skips, on all ranks alike.

    A skipped update leaves weights, moments, averages and AdamW's step count as they were, and drops the
    gradients. sharded: names of the weights that are split over tensor ranks; the others are replicated
    there. clip: maximum gradient norm; infinite for none.
    """

    def __init__(
        self,
        engine: DeepSpeedEngine,
        state: OptimizerState,
        consensus: StepConsensus,
        mesh: Mesh,
        sharded: set[str],
        clip: float,
    ):
        # DeepSpeed makes its own update at the end of the backward pass and has no setting for it.
        engine._take_model_step = lambda lr_kwargs=None: None
        self._state, self._consensus, self._clip = state, consensus, clip
        self._gradients = make_gradients(engine, state)
        self.is_fused = not self._gradients.has_replicas and state.storages[0].weight.is_cuda
        """Whether one kernel makes the whole update of a storage."""
        # The norm counts each weight once: on one of its replicas.
        is_first = mesh.rank("tensor") == 0
        counts_all = not self._gradients.has_replicas or mesh.rank("data") == mesh.rank("ulysses") == 0
        self._counted, self._replicas = ([_pieces(s, state) for s in state.storages] for _ in range(2))
        for kind, is_kept in ((self._counted, True), (self._replicas, False)):
            for pieces in kind:
                pieces[:] = [p for p in pieces if (counts_all and (is_first or p[2] in sharded)) == is_kept]

    def close(self) -> None:
        """Remove hooks."""
        self._gradients.close()

    def end_micro_batch(self) -> None:
        """Called after the backward pass of each micro-batch, without a pipeline."""
        self._gradients.end_micro_batch()

    @torch.no_grad()
    def make_or_skip(self, average: EmaUpdate | None) -> None:
        """Update weights and averages. Called by every rank after backward; waits for no device."""
        gradients = self._gradients.take()
        norm = self._own_norm(gradients, self._counted)
        square = norm.square()
        if any(self._replicas):
            # Not counted, but NaN if one is not finite.
            replicas = self._own_norm(gradients, self._replicas)
            square += replicas - replicas
        self._consensus.decide(square)
        # Clipping multiplies by this; it is 1 where the norm is smaller.
        scale = 1.0 / ((self._consensus.grad_norm + 1e-6) / self._clip).clamp(min=1.0)
        self._apply(gradients, scale, self._consensus.found_inf, average)
        self._gradients.clear()

    def _own_norm(self, gradients: list[Tensor | None], pieces: list[list]) -> Tensor:
        """Norm of the pieces of this rank's gradients, 0-dim float32."""
        found = [
            [
                gradient if length == gradient.numel() else gradient.narrow(0, offset, length)
                for offset, length, _ in own
            ]
            for gradient, own in zip(gradients, pieces, strict=True)
            if gradient is not None and own
        ]
        if not found:
            return torch.zeros((), device=self._consensus.device)
        # In float64, as DeepSpeed adds them.
        norms = iter(torch._foreach_norm([p for group in found for p in group], dtype=torch.float64))
        groups = [torch.stack([next(norms) for _ in group]) for group in found]
        if self._gradients.has_replicas:
            groups = [torch.cat(groups)]
        roots = [group.square().sum().float().sqrt() for group in groups]
        return torch.linalg.vector_norm(torch.stack(roots)).to(self._consensus.device)

    def _apply(
        self, gradients: list[Tensor | None], scale: Tensor, skip: Tensor, average: EmaUpdate | None
    ) -> None:
        pairs = [(s, g) for s, g in zip(self._state.storages, gradients, strict=True) if g is not None]
        if pairs and self.is_fused:
            self._apply_fused(pairs, scale, skip, average)
            return
        if pairs:
            # A copy for an optimizer in host memory, which waits for the device.
            device = pairs[0][0].weight.device
            scale, skip = scale.to(device), skip.to(device)
            torch._foreach_mul_([gradient for _, gradient in pairs], scale)
            for group in {id(storage.group): storage.group for storage, _ in pairs}.values():
                update_group([pair for pair in pairs if pair[0].group is group], skip)
        if average and average.ema.fragments:
            ema, skip = average.ema, skip.to(average.ema.fragments[0].device)
            weights = [average.weight * (1.0 - skip)] * len(ema.fragments)
            torch._foreach_lerp_(ema.fragments, ema.weights, weights)
        self._gradients.sync_model()

    def _apply_fused(
        self, pairs: list[tuple[Storage, Tensor]], scale: Tensor, skip: Tensor, average: EmaUpdate | None
    ) -> None:
        """One kernel a storage, each of which has a gradient."""
        from megafusion.engine.fused_update import fused_update, scalars

        parts = self._gradients.model_parts
        numbers = scalars(pairs[0][0], scale, skip, average.weight if average else 0.0)
        for number, (storage, gradient) in enumerate(pairs):
            averages = average.ema.storage(storage.weight) if average else None
            fused_update(storage, gradient, averages, parts[number] if parts else None, numbers)
        # One tensor for each: a shared one would be read by the host.
        torch._foreach_add_([storage.step for storage, _ in pairs], [1.0 - skip] * len(pairs))
        if parts:
            self._gradients.gather_model()
        else:
            self._gradients.sync_model()


def update_group(pairs: list[tuple[Storage, Tensor]], skip: Tensor) -> None:
    """AdamW on storages of one parameter group and their gradients, unless `skip` is 1."""
    group = pairs[0][0].group
    adamw(
        [storage.weight for storage, _ in pairs],
        [gradient for _, gradient in pairs],
        [storage.exp_avg for storage, _ in pairs],
        [storage.exp_avg_sq for storage, _ in pairs],
        [],
        [storage.step for storage, _ in pairs],
        fused=True,
        found_inf=skip,
        amsgrad=False,
        maximize=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
    )


def _pieces(storage: Storage, state: OptimizerState) -> list[tuple[int, int, str]]:
    """Offset, length and name of each weight in a storage, in order; padding is in none."""
    found = [(s.offset, s.weight.numel(), s.name) for s in state.shards if s.storage is storage.weight]
    return sorted(found)
