"""The tensors that a rank of this repository holds in a step, found by looking for them."""

import gc
from collections import Counter

import torch
from torch import Tensor

from megafusion.config import parse_config
from megafusion.engine.ema import Ema
from megafusion.parallel.mesh import make_mesh
from megafusion.train.build import build_engine
from megafusion.train.config import RunConfig
from megafusion.train.loop import train_step
from tests.parallel.cases import Batches

BUCKET_NUMBERS = 500_000_000
"""Of DeepSpeed's reduce buckets, which on a CPU are address space alone."""


class SavedBytes:
    """Bytes of the storages that autograd keeps for backward, now and at most, but not the parameters'."""

    def __init__(self, parameters: set[int]):
        self._parameters, self._users = parameters, Counter()
        self.now = self.peak = 0

    def pack(self, tensor: Tensor) -> "Kept":
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._parameters:
            self._users[key] += 1
            if self._users[key] == 1:
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
        return Kept(self, tensor, key, storage.nbytes())

    def drop(self, key: int, size: int) -> None:
        if key not in self._parameters:
            self._users[key] -= 1
            if not self._users[key]:
                self.now -= size


class Kept:
    """A tensor that autograd saved."""

    def __init__(self, counter: SavedBytes, tensor: Tensor, key: int, size: int):
        self._counter, self.tensor, self._key, self._size = counter, tensor, key, size

    def __del__(self):
        self._counter.drop(self._key, self._size)


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


def held(values: dict) -> tuple[int, int]:
    """Bytes of this rank's state after its second step's backward pass, and what autograd kept at most."""
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
    saved = SavedBytes({p.untyped_storage()._cdata for p in parameters})
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda kept: kept.tensor):
        engine.forward_backward(rows[1])
    gc.collect()
    state = sum(size for address, size in storages(parameters).items() if address not in before)
    assert ema.fragments
    return state, saved.peak
