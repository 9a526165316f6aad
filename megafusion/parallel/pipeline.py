"""The layers of the model on one rank: all of them, or those of a pipeline stage.

Stages send two tensors to the next: one of floats (the residual stream and the adapter's skips) and one of
integers (positions, mask and image slots). One float tensor means one backward pass a stage; the shapes never
change, so that DeepSpeed allocates its buffers once. So do virtual stages (interleaved.py).
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from megafusion.model.adapters import Skips
from megafusion.model.rope import rope_positions
from megafusion.model.transformer import block_context
from megafusion.model.transfusion import Stem, Tail, Transfusion, alignment_errors
from megafusion.model.wrapper import canonical_name
from megafusion.objective.head import LanguageHead
from megafusion.objective.losses import Losses, Objective
from megafusion.parallel.mesh import Mesh
from megafusion.parallel.tensor import TensorParallelRegion
from megafusion.parallel.ulysses import SequenceShard
from megafusion.sequence.intervals import Intervals
from megafusion.sequence.packing import Inputs, PackedBatch, SequenceShape, Targets


class Stage(nn.Module):
    """Layers of a model, whose parameters have the names that they have there.

    virtual_stages: indices of the consecutive blocks of each; one without interleaving. The model's first has
    the stem too, Megatron's pre_process; its last has the tail, its post_process. num_rows: rows B of a
    micro-batch. skip_shapes: shapes of the adapter's skips for this rank's images.
    """

    def __init__(
        self,
        model: Transfusion,
        virtual_stages: Sequence[range],
        mesh: Mesh,
        shape: SequenceShape,
        num_rows: int,
        skip_shapes: Sequence[torch.Size],
    ):
        super().__init__()
        self.shape, self.num_rows, self.skip_shapes = shape, num_rows, skip_shapes
        self.config, self.virtual_stages = model.config, virtual_stages
        self.stem = model.stem if virtual_stages[0].start == 0 else None
        indices = [index for blocks in virtual_stages for index in blocks]
        self.blocks = nn.ModuleDict({str(index): model.blocks[index] for index in indices})
        self.tail = model.tail if virtual_stages[-1].stop == len(model.blocks) else None
        self.noise_process = model.objective.noise_process
        self.alignment, self.aligns = model.alignment, model.objective.aligns
        positions = shape.length // mesh.size("ulysses")
        positions //= mesh.size("tensor") if mesh.config.sequence else 1
        num_skipped = sum(skips.numel() for skips in skip_shapes)
        self.num_floats = num_rows * positions * model.config.hidden_size + num_skipped
        self.num_integers = num_rows * (4 * shape.length + 3 * shape.num_images)
        """Numbers in each of the two tensors that a virtual stage sends."""
        self.sequence_shard = SequenceShard(mesh.group("ulysses"))
        self.region = TensorParallelRegion(mesh) if mesh.size("tensor") > 1 else None
        self.image_sizes: deque[Tensor] | None = None
        """In a pipeline: image_size of the micro-batches to come, on the host, for the model's two ends."""

    def is_first(self, virtual_stage: int) -> bool:
        """Whether a virtual stage of this rank is the model's first."""
        return self.virtual_stages[virtual_stage].start == 0

    def is_last(self, virtual_stage: int) -> bool:
        """Whether a virtual stage of this rank is the model's last."""
        return self.virtual_stages[virtual_stage].stop == self.config.num_layers

    def forward(self, inputs: Sequence[Tensor], virtual_stage: int = 0) -> tuple[Tensor, ...]:
        """inputs: the fields of `Inputs` in the first stage, else the previous stage's floats and integers.

        Returns floats and integers for the next stage; from the last stage normalised hidden states
        [B, S, D] for the head, and predictions [B, N, C, H, W], of all positions and images of the rows; and
        errors [B, N] of alignment where the objective has it, which then has one stage.
        """
        stem = self.stem if self.is_first(virtual_stage) else None
        tail = self.tail if self.is_last(virtual_stage) else None
        if self.image_sizes is None:
            sizes_BN = Inputs(*inputs).image_size
        elif stem is not None or tail is not None:
            sizes_BN = self.image_sizes.popleft()
        if stem is not None:
            x_BSD, integers, skips = self._begin(stem, Inputs(*inputs)._replace(image_size=sizes_BN))
        else:
            floats, integers = inputs
            x_BSD, skips = self._unpack(floats)
        rows_4BS, slots_3BN = self._unpack_integers(integers)
        positions, row_end, last_query, patch_index = rows_4BS
        intervals = Intervals(row_end, last_query, self.shape.length, has_holes=self.shape.clean_context)
        positions = rope_positions(self.config, positions, patch_index, slots_3BN[2])
        positions, is_patch = map(self.sequence_shard.shard, (positions, patch_index >= 0))
        is_patch_residual = self.region.shard(is_patch) if self.region else is_patch
        context = block_context(self.config, intervals, positions, x_BSD.dtype, is_patch, is_patch_residual)
        alignment: list[Tensor] = []
        for index in self.virtual_stages[virtual_stage]:
            x_BSD = self.blocks[str(index)](x_BSD, context)
            if self.alignment and self.aligns(index + 1):
                alignment = self._align(x_BSD, Inputs(*inputs))
        if tail is None:
            return torch.cat([x_BSD.flatten(), *(skip.flatten() for skip in skips)]), integers
        return *self._end(tail, x_BSD, slots_3BN, skips, sizes_BN), *alignment

    @property
    def head(self) -> LanguageHead:
        """The language head, which the last stage has."""
        assert self.tail is not None
        return self.tail.head

    def named_parameters(self, *args, **kwargs) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters with their canonical names, which checkpoints use, in the order of their first use."""
        order = {id(parameter): place for place, parameter in enumerate(self._parameters_as_used())}
        found = super().named_parameters(*args, **kwargs)
        for name, parameter in sorted(found, key=lambda pair: order[id(pair[1])]):
            yield canonical_name(name), parameter

    def _parameters_as_used(self) -> Iterable[nn.Parameter]:
        """All parameters in the order in which forward first uses them: a tied head's is the embedding's."""
        modules = [self.stem]
        for index, block in self.blocks.items():
            modules += [block, self.alignment if self.aligns(int(index) + 1) else None]
        modules.append(self.tail)
        return dict.fromkeys(p for module in modules if module for p in module.parameters())

    def _begin(self, stem: Stem, inputs: Inputs) -> tuple[Tensor, Tensor, Skips]:
        noised = self.noise_process.add_noise(inputs.latents, inputs.noise, inputs.t)
        timesteps, clean = self.noise_process.timesteps(inputs.t), None
        if self.shape.clean_context:
            clean = inputs.latents, self.noise_process.timesteps(torch.zeros_like(inputs.t))
        x_BSD, skips = stem(inputs.tokens, inputs.patch_index, noised, timesteps, inputs.image_size, clean)
        x_BSD = self.sequence_shard.reduce_scatter(x_BSD)
        if self.region is not None:
            x_BSD = self.region.reduce_or_scatter(x_BSD)
        rows = torch.stack([inputs.positions, inputs.row_end, inputs.last_query, inputs.patch_index])
        # The bits of t: exact, and no second float tensor.
        image_size_BN = inputs.image_size.to(inputs.image_start, non_blocking=True)
        slots = torch.stack([inputs.image_start, inputs.t.view(torch.int32), image_size_BN])
        return x_BSD, torch.cat([rows.flatten(), slots.flatten()]), skips

    def _end(
        self, tail: Tail, x_BSD: Tensor, slots_3BN: Tensor, skips: Skips, sizes_BN: Tensor
    ) -> tuple[Tensor, Tensor]:
        image_start, t_bits, _ = slots_3BN
        hidden_BSD = self._all_positions(tail(x_BSD))
        timesteps = self.noise_process.timesteps(t_bits.view(torch.float32))
        images = tail.images(hidden_BSD, image_start, timesteps, skips, sizes_BN)
        return hidden_BSD, images

    def _align(self, x_BSD: Tensor, inputs: Inputs) -> list[Tensor]:
        """Errors [B, N] of alignment, where the batch has features."""
        if self.alignment is None or not inputs.features.ndim:
            return []
        x_BSD = self._all_positions(x_BSD)
        return [alignment_errors(self.alignment, x_BSD, inputs.image_start, inputs.features)]

    def _all_positions(self, x_BSD: Tensor) -> Tensor:
        """All positions of the residual stream, for different work on each rank."""
        if self.region is not None:
            x_BSD = self.region.gather_or_copy(x_BSD)
        return self.sequence_shard.all_gather(x_BSD)

    def _unpack(self, floats: Tensor) -> tuple[Tensor, Skips]:
        sizes = [shape.numel() for shape in self.skip_shapes]
        x, *skips = floats.split([floats.numel() - sum(sizes), *sizes])
        shaped = tuple(skip.view(shape) for skip, shape in zip(skips, self.skip_shapes, strict=True))
        return x.view(self.num_rows, -1, self.config.hidden_size), shaped

    def _unpack_integers(self, integers: Tensor) -> tuple[Tensor, Tensor]:
        num_rows, length = self.num_rows, self.shape.length
        rows, slots = integers.tensor_split((4 * num_rows * length,))
        return rows.view(4, num_rows, length), slots.view(3, num_rows, -1)


class ModelWithLoss(nn.Module):
    """All layers and the losses on one rank; without gradients, the sums that a validation adds up."""

    def __init__(self, stage: Stage, objective: Objective):
        super().__init__()
        self.stage, self.objective = stage, objective

    def forward(self, batch: PackedBatch) -> Losses | Tensor:
        """Both losses, each a share of its mean over the global batch; or `Objective.sums`."""
        hidden_BSD, images, *alignment = self.stage(batch.inputs())
        head, targets = self.stage.head, batch.targets()
        if not torch.is_grad_enabled():
            return self.objective.sums(head, hidden_BSD, images, targets)
        return self.objective(head, hidden_BSD, images, targets, *alignment)


class PipelineLosses:
    """The total loss of the last stage for DeepSpeed's pipeline, scaled against its averaging.

    Our losses are shares of global means. DeepSpeed averages gradients over micro-batches and over the ranks
    that hold the same weights, so the total is multiplied by both. report: called with each micro-batch's
    losses. report_sums: without gradients, called with its `Objective.sums`.
    """

    def __init__(
        self,
        stage: Stage,
        objective: Objective,
        mesh: Mesh,
        num_micro_batches: int,
        report: Callable[[Iterable[Tensor]], None],
        report_sums: Callable[[Tensor], None],
    ):
        self.stage, self.objective = stage, objective
        self.report, self.report_sums = report, report_sums
        self.averaged_over = num_micro_batches * mesh.size("data") * mesh.size("ulysses")

    def __call__(self, outputs: tuple[Tensor, Tensor], targets: Sequence[Tensor]) -> Tensor:
        head = self.stage.head
        if not torch.is_grad_enabled():
            sums = self.objective.sums(head, *outputs, Targets(*targets))
            self.report_sums(sums)
            return sums[0]
        losses: Losses = self.objective(head, *outputs, Targets(*targets))
        self.report(losses)
        return losses.total * self.averaged_over
