"""Figures of a line of metrics: speed, and how full the rows are."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import torch
import torch.distributed as dist

from megafusion.data.loader import packed_and_skipped
from megafusion.engine.config import TrainConfig
from megafusion.engine.engine import Engine
from megafusion.model.config import ModelConfig
from megafusion.objective.alignment import Alignment
from megafusion.objective.config import AlignmentConfig
from megafusion.parallel.balance import layer_flops
from megafusion.sequence.packing import PackedBatch, SequenceShape

# Dense bf16 FLOP/s with tensor cores, from NVIDIA's data sheets; longer names first.
_BF16_PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "GH200": 989e12,
    "H100": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "GB200": 2500e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
}


def peak_flops(precision: str) -> float | None:
    """Peak FLOP/s of this device; None for a chip or a precision that the table does not contain."""
    if not torch.cuda.is_available() or precision == "fp32":
        return None
    name = torch.cuda.get_device_name()
    bf16 = next((peak for part, peak in _BF16_PEAKS.items() if part in name), None)
    return bf16 and bf16 * (2 if precision == "fp8" and "A100" not in name else 1)


class Work(NamedTuple):
    """Counts that FLOPs depend on, of a global batch or of several; see `PackedBatch.work`."""

    text_targets: float
    visible_pairs: float
    images: tuple[float, ...]
    """Images of each size."""

    @classmethod
    def of(cls, counts: Sequence[float]) -> "Work":
        """The counts in `PackedBatch.work`'s order."""
        targets, pairs, *images = counts
        return cls(targets, pairs, tuple(images))


def throughput(
    step_seconds: float,
    train: TrainConfig,
    model: ModelConfig,
    shape: SequenceShape,
    work: Work,
    alignment: AlignmentConfig | None = None,
) -> dict[str, float]:
    """tokens_per_second, and mfu where the chip's peak is known; see `step_flops`."""
    figures = {"tokens_per_second": train.global_batch_size * shape.length / step_seconds}
    if peak := peak_flops(train.precision):
        flops = step_flops(train.global_batch_size, model, shape, work, alignment)
        figures["mfu"] = flops / (step_seconds * peak * dist.get_world_size())
    return figures


def step_flops(
    num_rows: int,
    model: ModelConfig,
    shape: SequenceShape,
    work: Work,
    alignment: AlignmentConfig | None = None,
) -> float:
    """FLOPs that training needs for rows with this work, three times those of a forward pass.

    Forward, all matrix products: blocks at every position, the head at text targets alone (2 x vocab_size x
    hidden_size each), attention for visible pairs alone (4 x num_heads x head_dim each, in every block), for
    each image the adapter, with clean context its first half twice, and the projection of `alignment`.
    Recomputation is not counted, nor masked pairs and empty image slots that are computed; nor the frozen
    encoders of pixels, because shards may hold what they give; nor validation, which
    trains nothing and is as frequent as `data.validation` says. An integer of integers, so sums of it are
    exact. Frozen weights and LoRA are counted as trained.
    """
    per_pair = 4 * model.num_layers * model.num_heads * model.head_size
    dense_row = _block_flops(model, shape) - per_pair * shape.length**2
    images = zip(work.images, _image_flops(model, shape, alignment), strict=True)
    forward = num_rows * dense_row + _head_flops(model) * work.text_targets + per_pair * work.visible_pairs
    return 3 * (forward + sum(number * flops for number, flops in images))


def _head_flops(model: ModelConfig) -> int:
    """Of the language head for a position."""
    return 2 * model.vocab_size * model.hidden_size


@cache
def _block_flops(model: ModelConfig, shape: SequenceShape) -> int:
    """Forward FLOPs of all blocks for a row with every pair; counting runs a model on the meta device."""
    return sum(layer_flops(model, shape)[1:-1])


@cache
def _image_flops(
    model: ModelConfig, shape: SequenceShape, alignment: AlignmentConfig | None = None
) -> tuple[int, ...]:
    """Forward FLOPs of adapter and alignment for an image of each size; 0 where images are codes."""
    found = []
    for number, size in enumerate(model.image_sizes):
        one = model.model_copy(update={"image_sizes": (size,), "num_layers": 1})
        patches, sizes = shape.patches[number : number + 1], shape.sizes[number : number + 1]
        slot = replace(shape, num_images=1, patches=patches, sizes=sizes)
        stem, _, tail = layer_flops(one, slot)
        aligned = _alignment_flops(model, alignment) * patches[0] if alignment else 0
        found.append(stem + tail - _head_flops(model) * shape.length + aligned)
    return tuple(found)


def _alignment_flops(model: ModelConfig, alignment: AlignmentConfig) -> int:
    """Forward FLOPs of the projection for a patch."""
    with torch.device("meta"):
        layers = Alignment(model.hidden_size, alignment).layers
    return sum(2 * weight.numel() for weight in layers.parameters() if weight.ndim == 2)


class PackingMonitor:
    """Fill and work of all ranks' rows, and each source's share.

    state: of the loader at the start of this attempt. flops: of training until then; None where they are not
    known, because an earlier version began the run. work: of a global batch, the mean over those between the
    last two readings.
    """

    def __init__(
        self,
        sources: Iterable[str],
        num_rows: int,
        model: ModelConfig,
        shape: SequenceShape,
        engine: Engine,
        state: dict,
        flops: int | None,
        alignment: AlignmentConfig | None,
    ):
        self._names, self._num_rows, self._engine = list(sources), num_rows, engine
        self._model, self._shape, self._alignment = model, shape, alignment
        self._flops_before = flops
        self._added = torch.zeros(2 + len(model.image_sizes), dtype=torch.int64)
        self._before = self._start = self._counts(state)

    def add(self, micro_batches: Iterable[PackedBatch]) -> None:
        """Count this rank's rows of a global batch, which are still on the host."""
        for batch in micro_batches:
            self._added += batch.work(len(self._model.image_sizes))

    def read(self, state: dict) -> dict[str, float]:
        """Fractions of the positions since the last reading: real, padding, of each source among the real
        ones; since the run began, documents skipped and FLOPs of training."""
        counts, num_sources = self._counts(state), len(self._names)
        packed, _, work, batches = _parted(counts - self._before, num_sources)
        self._before, self.work = counts, Work.of([number / batches for number in work])
        fill = sum(packed) / (batches * self._num_rows * self._shape.length)
        shares = {f"share/{n}": p / sum(packed) for n, p in zip(self._names, packed, strict=True)}
        skipped, flops = _parted(counts, num_sources)[1], self._flops(counts)
        known = {} if flops is None else {"flops": float(flops)}
        return {"fill": fill, "padding": 1 - fill, **shares, "documents_skipped": skipped, **known}

    def flops(self, state: dict) -> int | None:
        """FLOPs of training since the run began, skipped steps included; see `step_flops`."""
        return self._flops(self._counts(state))

    def _flops(self, counts: torch.Tensor) -> int | None:
        if self._flops_before is None:
            return None
        _, _, work, batches = _parted(counts - self._start, len(self._names))
        rows = self._num_rows * batches
        new = step_flops(rows, self._model, self._shape, Work.of(work), self._alignment)
        return self._flops_before + int(new)

    def _counts(self, state: dict) -> torch.Tensor:
        """int64 [sources + 4 + sizes]: positions packed by source, documents skipped, work, summed over the
        data-parallel ranks; global batches."""
        packed, skipped = packed_and_skipped(state)
        values = [*(packed[name] for name in self._names), skipped, *self._added.tolist()]
        counts = torch.tensor(values, dtype=torch.int64, device=self._engine.device)
        dist.all_reduce(counts, group=self._engine.mesh.group("data"))
        return torch.cat([counts, counts.new_tensor([state["batch_number"]])])


def _parted(counts: torch.Tensor, num_sources: int) -> tuple[list[int], int, list[int], int]:
    """Positions packed by source, documents skipped, work, global batches."""
    values = counts.tolist()
    return values[:num_sources], values[num_sources], values[num_sources + 1 : -1], values[-1]
