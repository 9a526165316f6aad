"""Figures of a line of metrics: speed, and how full the rows are."""

from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

import torch
import torch.distributed as dist

from megafusion.data.loader import packed_and_skipped
from megafusion.engine.config import TrainConfig
from megafusion.engine.engine import Engine
from megafusion.model.config import ModelConfig
from megafusion.parallel.balance import layer_flops
from megafusion.sequence.packing import PackedBatch, SequenceShape

# Dense bf16 FLOP/s with tensor cores, from NVIDIA's data sheets; longer names first.
_BF16_PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "GH200": 989e12,
    "H100": 989e12,
    "H200": 989e12,
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
    """Counts of a global batch that its FLOPs depend on; see `PackedBatch.work`."""

    text_targets: float
    visible_pairs: float


def throughput(
    step_seconds: float, train: TrainConfig, model: ModelConfig, shape: SequenceShape, work: Work
) -> dict[str, float]:
    """tokens_per_second, and mfu where the chip's peak is known."""
    figures = {"tokens_per_second": train.global_batch_size * shape.length / step_seconds}
    if peak := peak_flops(train.precision):
        flops = step_flops(train.global_batch_size, model, shape, work)
        figures["mfu"] = flops / (step_seconds * peak * dist.get_world_size())
    return figures


def step_flops(num_rows: int, model: ModelConfig, shape: SequenceShape, work: Work) -> float:
    """FLOPs that a step needs, three times those of a forward pass.

    Forward, all matrix products of stem, blocks and tail at every position and image slot, but the head's at
    text targets alone (2 x vocab_size x hidden_size each), and attention for visible pairs alone (4 x
    num_heads x head_dim each, in every block). Recomputation is not counted, nor masked pairs that are
    computed.
    """
    per_target = 2 * model.vocab_size * model.hidden_size
    per_pair = 4 * model.num_layers * model.num_heads * model.head_size
    dense_row = _row_flops(model, shape) - per_target * shape.length - per_pair * shape.length**2
    return 3 * (num_rows * dense_row + per_target * work.text_targets + per_pair * work.visible_pairs)


@cache
def _row_flops(model: ModelConfig, shape: SequenceShape) -> int:
    """Forward FLOPs of a row with every position and pair. Counting them runs a model on the meta device."""
    return sum(layer_flops(model, shape))


class PackingMonitor:
    """Fill and work of all ranks' rows, and each source's share. num_tokens: positions of a global batch.

    work: of a global batch, the mean over those between the last two readings.
    """

    def __init__(self, sources: Iterable[str], num_tokens: int, engine: Engine, state: dict):
        self._names, self._num_tokens, self._engine = list(sources), num_tokens, engine
        self._added = torch.zeros(2, dtype=torch.int64)
        self._before = self._counts(state)

    def add(self, micro_batches: Iterable[PackedBatch]) -> None:
        """Count this rank's rows of a global batch, which are still on the host."""
        for batch in micro_batches:
            self._added += batch.work()

    def read(self, state: dict) -> dict[str, float]:
        """Fractions of the positions since the last reading: real, padding, of each source among the real
        ones; documents skipped since the run began."""
        counts = self._counts(state)
        *packed, _, targets, pairs, batches = (counts - self._before).tolist()
        self._before, self.work = counts, Work(targets / batches, pairs / batches)
        fill = sum(packed) / (batches * self._num_tokens)
        shares = {f"share/{n}": p / sum(packed) for n, p in zip(self._names, packed, strict=True)}
        return {"fill": fill, "padding": 1 - fill, **shares, "documents_skipped": int(counts[-4])}

    def _counts(self, state: dict) -> torch.Tensor:
        """int64 [sources + 4]: positions packed by source, documents skipped, text targets and visible pairs,
        summed over the data-parallel ranks; global batches."""
        packed, skipped = packed_and_skipped(state)
        values = [*(packed[name] for name in self._names), skipped, *self._added.tolist()]
        counts = torch.tensor(values, dtype=torch.int64, device=self._engine.device)
        dist.all_reduce(counts, group=self._engine.mesh.group("data"))
        return torch.cat([counts, counts.new_tensor([state["batch_number"]])])
