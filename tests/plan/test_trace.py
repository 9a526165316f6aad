"""Saved activations in closed form against a trace of the real blocks at 1.4B's width, without memory."""

import gc
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from megafusion.model.transformer import Block, block_context
from megafusion.parallel.activation_checkpointing import checkpointed
from megafusion.plan.activations import saved_by_block
from megafusion.plan.software import of_run
from megafusion.sequence.intervals import Intervals
from tests.plan.test_counts import configuration
from tests.support.marks import full

LENGTH = 512


def make_blocks(config, number: int) -> torch.nn.ModuleList:
    """Blocks in bf16, also on fake tensors, which cannot be cast in place."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        return torch.nn.ModuleList(Block(config.model) for _ in range(number))
    finally:
        torch.set_default_dtype(torch.float32)


def live_bytes(config, num_blocks: int) -> int:
    """Bytes of all tensors but weights that are alive after the forward pass of some blocks."""
    with FakeTensorMode() as mode, torch.device("cpu"):
        blocks = make_blocks(config, num_blocks)
        own = {parameter.untyped_storage()._cdata for parameter in blocks.parameters()}
        bounds = torch.zeros(1, LENGTH, dtype=torch.int32)
        context = block_context(
            config.model, Intervals(bounds, bounds, LENGTH), bounds, torch.bfloat16, bounds < 0
        )
        x = torch.zeros(1, LENGTH, config.model.hidden_size, dtype=torch.bfloat16, requires_grad=True) * 1
        kept = []

        def keep(tensor: Tensor) -> Tensor:
            kept.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            for block in blocks:
                recompute = config.train.recompute
                x = (block if recompute == "none" else checkpointed(block, recompute))(x, context)
        gc.collect()
        found = {}
        for each in gc.get_objects():
            if type(each) is FakeTensor and each.fake_mode is mode:
                storage = each.untyped_storage()
                if storage._cdata not in own:
                    found[storage._cdata] = storage.nbytes()
        return sum(found.values())


QUICK = [("none", 16), ("selective", 4)]
ALL = [(kind, kv_heads) for kind in ("none", "selective", "full") for kv_heads in (16, 4)]


@pytest.mark.parametrize(
    ("recompute", "kv_heads"), [*QUICK, *full(*(each for each in ALL if each not in QUICK))]
)
def test_two_depths_of_the_real_blocks_save_what_the_closed_form_says(recompute, kv_heads):
    overrides = ("train.compile=false", f"train.recompute={recompute}", f"model.num_kv_heads={kv_heads}")
    config = configuration("1.4b.yaml", *overrides)
    traced = (live_bytes(config, 4) - live_bytes(config, 2)) / 2
    job = config.job(1)
    software = replace(of_run(job.train, "sdpa"), fuses_norms=False)
    assert traced / LENGTH == pytest.approx(2 * saved_by_block(job, software), rel=0.02)


@pytest.mark.parametrize("kv_heads", full(8, 2))
def test_what_a_compiled_block_saves_is_the_choice_of_torchs_partitioner(kv_heads):
    overrides = ("train.precision=bf16", "train.compile=true", "model.hidden_size=512")
    config = configuration("1.4b.yaml", *overrides, "model.num_heads=8", f"model.num_kv_heads={kv_heads}")
    blocks = make_blocks(config, 2)
    own = {parameter.untyped_storage()._cdata for parameter in blocks.parameters()}
    positions = torch.arange(LENGTH, dtype=torch.int32)
    context = block_context(
        config.model,
        Intervals(positions[None] + 1, None, LENGTH),
        positions[None],
        torch.bfloat16,
        positions[None] < 0,
    )
    for block in blocks:
        block.compile(backend="aot_eager_decomp_partition")  # inductor's partitioner without its kernels
    saved = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = (storage.nbytes(), tensor)
        return tensor

    x = torch.zeros(1, LENGTH, 512, dtype=torch.bfloat16, requires_grad=True) * 1
    depths = []
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        for block in blocks:
            x = block(x, context)
            depths.append(sum(size for size, _ in saved.values()))
    job = config.job(1)
    planned = 2 * LENGTH * saved_by_block(job, of_run(job.train, "sdpa"))
    assert depths[1] - depths[0] == pytest.approx(planned, rel=0.01)
