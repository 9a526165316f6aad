"""The tensors that a rank of this repository holds in a step, found by looking for them."""

import gc
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from megafusion.config import parse_config
from megafusion.engine.ema import Ema
from megafusion.engine.gradients import ShardedGradients
from megafusion.parallel.mesh import make_mesh
from megafusion.train.build import build_engine
from megafusion.train.config import RunConfig
from megafusion.train.loop import train_step
from tests.parallel.cases import Batches

BUCKET_NUMBERS = 500_000_000
"""Of DeepSpeed's buckets at ZeRO 3, which on a CPU are address space alone."""


class Peak:
    """Most bytes that are held when a backward pass begins; `measure` counts them.

    Saved tensors pass through Python here, where `storages` finds them.
    """

    def __init__(self, measure: Callable[[], int]):
        self._measure, self._is_forward, self.bytes = measure, False, 0

    def pack(self, tensor: Tensor) -> "Saved":
        self._is_forward = True
        return Saved(self, tensor)

    def drop(self) -> None:
        """Called when a saved tensor is dropped: the first after a forward pass begins a backward pass."""
        if self._is_forward:
            self.bytes = max(self.bytes, self._measure())
        self._is_forward = False


class Saved:
    """A tensor that autograd saved."""

    def __init__(self, peak: Peak, tensor: Tensor):
        self._peak, self.tensor = peak, tensor

    def __del__(self):
        self._peak.drop()


def storages(parameters: list) -> dict[int, int]:
    """Bytes of every live storage, by address, without the buckets."""
    gradients = [p.grad for p in parameters]  # which have a Python object from here on
    found = {}
    for each in gc.get_objects():
        if issubclass(type(each), Tensor) and each.device.type == "cpu" and each.layout == torch.strided:
            storage = each.untyped_storage()
            if storage.nbytes() != BUCKET_NUMBERS * each.element_size():
                found[storage.data_ptr()] = storage.nbytes()
    del gradients
    return found


class Held(NamedTuple):
    """Memory that a rank holds in its second step."""

    state: int
    """Bytes after its backward passes, when no bucket is in flight."""
    passes: int
    """Bytes beyond those when a backward pass begins, at most: saved, sent and received."""
    num_reductions: int
    """Collectives of engine/buckets.py that reduce the gradients once."""


def held(values: dict) -> Held:
    """Run two steps, and measure in the second."""
    config = parse_config(RunConfig, values, "test")
    mesh = make_mesh(config.parallel)
    batches = Batches(values, mesh)
    rows = batches.next(), batches.next()
    gc.collect()
    before = storages([])
    engine = build_engine(config, mesh)
    ema = Ema(engine.optimizer_state.shards, 0.9)
    train_step(engine, rows[0], 1e-3)
    parameters = list(engine.stage.parameters())

    def measure() -> int:
        return sum(size for address, size in storages(parameters).items() if address not in before)

    peak = Peak(measure)
    with torch.autograd.graph.saved_tensors_hooks(peak.pack, lambda saved: saved.tensor):
        engine.forward_backward(rows[1])
    gradients, num_reductions = engine._update._gradients, 0
    if isinstance(gradients, ShardedGradients):
        gradients.take()
        num_reductions = len(gradients.buckets._buckets)
    gc.collect()
    state = measure()
    assert ema.fragments
    return Held(state, peak.bytes - state, num_reductions)
