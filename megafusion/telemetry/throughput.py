"""What a line of metrics says: losses, speed, how full the rows are."""

import time

import torch
import torch.distributed as dist

from megafusion.data.loader import packed_and_skipped
from megafusion.engine.engine import Engine
from megafusion.objective.losses import Losses
from megafusion.parallel.balance import layer_flops
from megafusion.telemetry.peak_flops import peak_flops
from megafusion.train.config import RunConfig


def step_figures(losses: Losses, engine: Engine, rate: float) -> dict[str, float]:
    """Of the latest step. Synchronises with the device."""
    return {
        "text_loss": losses.text.item(),
        "image_loss": losses.image.item(),
        "gradient_norm": engine.grad_norm(),
        "learning_rate": rate,
    }


class StepTimer:
    """Seconds that a run has trained, restarts included, and its speed since the last reading."""

    def __init__(self, config: RunConfig, step: int, spent_seconds: float):
        rows = config.train.global_batch_size
        self._started = self._read = time.monotonic()
        self._read_step, self._spent = step, spent_seconds
        self._positions = rows * config.data.sequence_length
        self._peak = peak_flops(config.train.precision)
        # A backward pass is twice a forward pass; what is computed again for recompute is not counted.
        self._flops = 3 * rows * sum(layer_flops(config.model, config.sequence_shape)) if self._peak else 0

    def seconds(self) -> float:
        """Since the run first began, without the time between its starts."""
        return self._spent + time.monotonic() - self._started

    def read(self, step: int) -> dict[str, float]:
        """tokens_per_second; mfu, where the chip's peak is known; seconds."""
        now = time.monotonic()
        steps_per_second = (step - self._read_step) / (now - self._read)
        self._read, self._read_step = now, step
        figures = {"tokens_per_second": steps_per_second * self._positions, "seconds": self.seconds()}
        if self._peak:
            figures["mfu"] = steps_per_second * self._flops / (self._peak * dist.get_world_size())
        return figures

    def rewind(self, step: int) -> None:
        """The run has gone back to a step."""
        self._read, self._read_step = time.monotonic(), step


class Packing:
    """How full the rows of all ranks are and of what, since the last reading; called by every rank."""

    def __init__(self, config: RunConfig, engine: Engine, state: dict):
        self._names, self._engine = list(config.data.sources), engine
        self._row_positions = config.train.global_batch_size * config.data.sequence_length
        self._before = self._counts(state)

    def read(self, state: dict) -> dict[str, float]:
        """Share of the positions that are real, and padding; each source's share of the real ones; how many
        documents have been left out since the run began."""
        counts = self._counts(state)
        *packed, _, batches = (counts - self._before).tolist()
        self._before = counts
        fill = sum(packed) / (batches * self._row_positions)
        shares = {f"share/{n}": p / sum(packed) for n, p in zip(self._names, packed, strict=True)}
        return {"fill": fill, "padding": 1 - fill, **shares, "documents_skipped": int(counts[-2])}

    def _counts(self, state: dict) -> torch.Tensor:
        """int64 [sources + 2]: positions packed by source and documents left out, over the data-parallel
        ranks; global batches."""
        packed, skipped = packed_and_skipped(state)
        values = [*(packed[name] for name in self._names), skipped]
        counts = torch.tensor(values, dtype=torch.int64, device=self._engine.device)
        dist.all_reduce(counts, group=self._engine.mesh.group("data"))
        return torch.cat([counts, counts.new_tensor([state["batch_number"]])])
