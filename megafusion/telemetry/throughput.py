"""Figures of a line of metrics: losses, speed, how full the rows are."""

import time
from collections.abc import Iterable

import torch
import torch.distributed as dist

from megafusion.data.loader import packed_and_skipped
from megafusion.engine.engine import Engine
from megafusion.model.config import ModelConfig
from megafusion.objective.losses import Losses
from megafusion.parallel.balance import layer_flops
from megafusion.sequence.packing import SequenceShape
from megafusion.telemetry.peak_flops import peak_flops


def step_figures(losses: Losses, engine: Engine, learning_rate: float) -> dict[str, float]:
    """Losses and gradient norm of the latest step. Synchronises with the device."""
    return {
        "text_loss": losses.text.item(),
        "image_loss": losses.image.item(),
        "gradient_norm": engine.grad_norm(),
        "learning_rate": learning_rate,
    }


class StepTimer:
    """Training time of a run over all its attempts, and its speed since the last reading.

    num_rows: packed sequences of a global batch. spent_seconds: training time before this attempt.
    """

    def __init__(
        self,
        num_rows: int,
        shape: SequenceShape,
        model: ModelConfig,
        precision: str,
        step: int,
        spent_seconds: float,
    ):
        self._started = self._read = time.monotonic()
        self._read_step, self._spent = step, spent_seconds
        self._num_tokens = num_rows * shape.length
        self._peak = peak_flops(precision)
        # A backward pass costs twice a forward pass; recomputation is not counted.
        self._flops = 3 * num_rows * sum(layer_flops(model, shape)) if self._peak else 0

    def seconds(self) -> float:
        """Training time of the run, without the time between attempts."""
        return self._spent + time.monotonic() - self._started

    def read(self, step: int) -> dict[str, float]:
        """tokens_per_second; mfu, where the chip's peak is known; seconds."""
        now = time.monotonic()
        steps_per_second = (step - self._read_step) / (now - self._read)
        self._read, self._read_step = now, step
        figures = {"tokens_per_second": steps_per_second * self._num_tokens, "seconds": self.seconds()}
        if self._peak:
            figures["mfu"] = steps_per_second * self._flops / (self._peak * dist.get_world_size())
        return figures

    def rewind(self, step: int) -> None:
        """Continue from an earlier step, after a rollback."""
        self._read, self._read_step = time.monotonic(), step


class PackingMonitor:
    """Fill of the rows of all ranks and the share of each source, since the last reading.

    sources: names. num_tokens: positions of a global batch. Every rank makes one and reads it.
    """

    def __init__(self, sources: Iterable[str], num_tokens: int, engine: Engine, state: dict):
        self._names, self._num_tokens, self._engine = list(sources), num_tokens, engine
        self._before = self._counts(state)

    def read(self, state: dict) -> dict[str, float]:
        """Fractions of the positions that are real and padding; each source's share of the real ones; number
        of documents skipped since the run began."""
        counts = self._counts(state)
        *packed, _, batches = (counts - self._before).tolist()
        self._before = counts
        fill = sum(packed) / (batches * self._num_tokens)
        shares = {f"share/{n}": p / sum(packed) for n, p in zip(self._names, packed, strict=True)}
        return {"fill": fill, "padding": 1 - fill, **shares, "documents_skipped": int(counts[-2])}

    def _counts(self, state: dict) -> torch.Tensor:
        """int64 [sources + 2]: positions packed by source and documents skipped, summed over the
        data-parallel ranks; global batches."""
        packed, skipped = packed_and_skipped(state)
        values = [*(packed[name] for name in self._names), skipped]
        counts = torch.tensor(values, dtype=torch.int64, device=self._engine.device)
        dist.all_reduce(counts, group=self._engine.mesh.group("data"))
        return torch.cat([counts, counts.new_tensor([state["batch_number"]])])
