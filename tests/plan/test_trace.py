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

LENGTH = 512


def live_bytes(config, num_blocks: int) -> int:
    """Bytes of all tensors but weights that are alive after the forward pass of some blocks."""
    with FakeTensorMode() as mode, torch.device("cpu"):
        torch.set_default_dtype(torch.bfloat16)
        try:
            blocks = torch.nn.ModuleList(Block(config.model) for _ in range(num_blocks))
        finally:
            torch.set_default_dtype(torch.float32)
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


@pytest.mark.parametrize("kv_heads", [16, 4])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_two_depths_of_the_real_blocks_save_what_the_closed_form_says(recompute, kv_heads):
    overrides = ("train.compile=false", f"train.recompute={recompute}", f"model.num_kv_heads={kv_heads}")
    config = configuration("1.4b.yaml", *overrides)
    traced = (live_bytes(config, 4) - live_bytes(config, 2)) / 2
    job = config.job(1)
    software = replace(of_run(job.train, "sdpa"), fuses_norms=False)
    assert traced / LENGTH == pytest.approx(2 * saved_by_block(job, software), rel=0.02)
