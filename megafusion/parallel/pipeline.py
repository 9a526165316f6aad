"""A consecutive run of the model's layers on one rank: all of them, or a pipeline stage's share.

Between stages travel two tensors: one of floats (the residual stream and the adapter's skips) and one of
integers (positions and mask, and where the images are). One float tensor means one backward pass a
stage; both keep their shape, so that DeepSpeed's buffers are made once.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from megafusion.model.adapters import Skips
from megafusion.model.transformer import block_context
from megafusion.model.transfusion import Transfusion
from megafusion.objective.losses import Losses, Objective
from megafusion.parallel.mesh import Mesh
from megafusion.parallel.tensor import TensorParallelRegion
from megafusion.parallel.ulysses import SequenceShard
from megafusion.sequence.intervals import Intervals
from megafusion.sequence.packing import Inputs, PackedBatch, Targets


@dataclass(frozen=True)
class Shapes:
    """What a micro-batch measures, the same for all."""

    num_rows: int
    """Rows B."""
    length: int
    """Positions S of a row."""
    num_slots: int
    """Image slots N of a row."""
    skips: tuple[torch.Size, ...]
    """The adapter's skips, of the images that this rank computes."""


class Stage(nn.Module):
    """Some consecutive layers of a model, named as they are named there.

    blocks: numbers of the blocks; the stem comes with the first of all, the tail with the last.
    """

    def __init__(self, model: Transfusion, blocks: range, mesh: Mesh, shapes: Shapes):
        super().__init__()
        self.shapes, self.config = shapes, model.config
        self.stem = model.stem if blocks.start == 0 else None
        self.blocks = nn.ModuleDict({str(number): model.blocks[number] for number in blocks})
        self.tail = model.tail if blocks.stop == len(model.blocks) else None
        self.noise_process = model.objective.noise_process
        self.slices = SequenceShard(mesh)
        self.region = TensorParallelRegion(mesh) if mesh.size("tensor") > 1 else None

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """inputs: the fields of `Inputs` at the stem, else what the stage before gave.

        Returns floats and integers for the next stage; at the tail logits of this rank's positions and
        words, and predictions [B, N, C, H, W] for all images of the rows.
        """
        if self.stem is not None:
            x_BSD, integers, skips = self._begin(Inputs(*inputs))
        else:
            floats, integers = inputs
            x_BSD, skips = self._unpack(floats)
        rows_3BS, slots_3BN = self._unpack_integers(integers)
        positions, row_start, row_end = rows_3BS
        intervals = Intervals(row_start, row_end, self.shapes.length)
        context = block_context(self.config, intervals, self.slices.take(positions), x_BSD.dtype)
        for block in self.blocks.values():
            x_BSD = block(x_BSD, context)
        if self.tail is None:
            return torch.cat([x_BSD.flatten(), *(skip.flatten() for skip in skips)]), integers
        return self._end(x_BSD, *slots_3BN, skips)

    def _begin(self, inputs: Inputs) -> tuple[Tensor, Tensor, Skips]:
        noised = self.noise_process.add_noise(inputs.latents, inputs.noise, inputs.t)
        timesteps = self.noise_process.timesteps(inputs.t)
        x_BSD, skips = self.stem(inputs.tokens, inputs.patch_index, noised, timesteps, inputs.image_size)
        x_BSD = self.slices.reduce_or_scatter(x_BSD)
        if self.region is not None:
            x_BSD = self.region.reduce_or_scatter(x_BSD)
        rows = torch.stack([inputs.positions, inputs.row_start, inputs.row_end])
        # The bits of t: exact, and no second float tensor.
        slots = torch.stack([inputs.image_start, inputs.t.view(torch.int32), inputs.image_size.int()])
        return x_BSD, torch.cat([rows.flatten(), slots.flatten()]), skips

    def _end(
        self, x_BSD: Tensor, image_start: Tensor, t_bits: Tensor, image_size: Tensor, skips: Skips
    ) -> tuple[Tensor, Tensor]:
        hidden_BSD = self.tail(x_BSD)
        if self.region is not None:
            hidden_BSD = self.region.gather_or_copy(hidden_BSD)
        hidden_BSD = self.slices.gather_or_copy(hidden_BSD)
        timesteps = self.noise_process.timesteps(t_bits.view(torch.float32))
        images = self.tail.images(hidden_BSD, image_start, timesteps, skips, image_size)
        return self.tail.head(self.slices.take(hidden_BSD)), images

    def _unpack(self, floats: Tensor) -> tuple[Tensor, Skips]:
        sizes = [prod(shape) for shape in self.shapes.skips]
        x, *skips = floats.split([floats.numel() - sum(sizes), *sizes])
        shaped = tuple(skip.view(shape) for skip, shape in zip(skips, self.shapes.skips, strict=True))
        return x.view(self.shapes.num_rows, -1, self.config.hidden_size), shaped

    def _unpack_integers(self, integers: Tensor) -> tuple[Tensor, Tensor]:
        rows = 3 * self.shapes.num_rows * self.shapes.length
        return (
            integers[:rows].view(3, self.shapes.num_rows, self.shapes.length),
            integers[rows:].view(3, self.shapes.num_rows, self.shapes.num_slots),
        )


class ModelWithLoss(nn.Module):
    """All layers on one rank, with the losses behind them."""

    def __init__(self, stage: Stage, objective: Objective):
        super().__init__()
        self.stage, self.objective = stage, objective

    def forward(self, batch: PackedBatch) -> Losses:
        """Both losses of a packed batch, each a share of its mean over the global batch."""
        logits, images = self.stage(batch.inputs())
        return self.objective(logits, images, batch.targets())


class PipelineLosses:
    """The losses of the last stage as DeepSpeed's pipeline wants them: to be averaged over what it averages.

    Ours are shares of global means already. It divides gradients by the micro-batches and by the ranks that
    share weights. `report` takes each micro-batch's shares as they are.
    """

    def __init__(
        self,
        objective: Objective,
        mesh: Mesh,
        num_micro_batches: int,
        report: Callable[[Iterable[Tensor]], None],
    ):
        self.objective, self.report = objective, report
        self.averaged_over = num_micro_batches * mesh.size("data") * mesh.size("ulysses")

    def __call__(self, outputs: tuple[Tensor, Tensor], targets: Sequence[Tensor]) -> Tensor:
        losses: Losses = self.objective(*outputs, Targets(*targets))
        self.report(losses)
        return losses.total * self.averaged_over
