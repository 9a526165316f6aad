"""The plan's memory is what ranks of this repository really hold, on CPUs."""

from dataclasses import replace

import pytest

from megafusion.config import parse_config
from megafusion.plan.communication import has_buckets, num_sent
from megafusion.plan.communication import num_reductions as planned_reductions
from megafusion.plan.memory import stage_memory
from megafusion.plan.software import of_run
from megafusion.train.config import RunConfig
from tests.parallel.matrix import Case
from tests.plan.ranks import held
from tests.support.marks import full
from tests.support.workers import run_workers

CASES = {
    "unet": (1, {}, "fp32", "unet"),
    "one": (1, {}, "bf16", "linear"),
    "dp2-zero1": (2, {}, "bf16", "linear"),
    "dp2-zero2": (2, {"zero_stage": 2}, "bf16", "linear"),
    "dp2-zero3": (2, {"zero_stage": 3}, "bf16", "linear"),
    "tp2": (2, {"tensor": 2}, "bf16", "linear"),
    "tp2-sequence": (2, {"tensor": 2, "sequence": True}, "bf16", "linear"),
    "pp2": (2, {"pipeline": 2}, "bf16", "linear"),
    "pp2-v2": (2, {"pipeline": 2, "virtual_stages": 2}, "bf16", "linear"),
    "pp2-unet": (2, {"pipeline": 2}, "bf16", "unet"),
    "pp2-v2-unet": (2, {"pipeline": 2, "virtual_stages": 2}, "bf16", "unet"),
    "ulysses2": (2, {"ulysses": 2}, "bf16", "linear"),
    "tp2-pp2": (4, {"tensor": 2, "pipeline": 2}, "bf16", "linear"),
    "tp2-dp2-zero3": (4, {"tensor": 2, "zero_stage": 3}, "bf16", "linear"),
}
QUICK = ["pp2"]
"""Two stages with one of each of the parts; the others differ by a degree or by the ZeRO stage."""
MAX_ERROR = 0.05


@pytest.mark.parametrize("name", [*QUICK, *full(*(name for name in CASES if name not in QUICK))])
def test_a_rank_holds_what_is_planned(shards, vae_folder, tmp_path, name):
    world, degrees, precision, adapter = CASES[name]
    case = Case(name, world, degrees, adapter, {"precision": precision})
    values = case.values(shards, vae_folder, tmp_path)
    # Four heads, so that no key is repeated for grouped queries: PyTorch does that on CPUs.
    values["model"] |= {"hidden_size": 128, "ffn_hidden_size": 512, "num_layers": 4, "num_heads": 4}
    # Skips of three times the residual stream, and micro-batches that are more than those in flight.
    values["model"] |= {"unet_channels": 64}
    values["train"] |= {"global_batch_size": 8}
    job = parse_config(RunConfig, values, "test").job(world)
    software = replace(of_run(job.train, "sdpa"), fuses_norms=False)
    for rank, (state, passes, num_reductions) in enumerate(run_workers(held, world, values)):
        stage = rank * job.parallel.pipeline // world
        plan = stage_memory(job, software, stage)
        size, has_head = job.model.hidden_size, plan.logits > 0
        planned_state, stays = plan.state, 0.0
        if job.parallel.pipeline > 1 == job.parallel.virtual_stages:
            # Buffers of DeepSpeed's pipeline: of inputs and of gradients; in the last stage two of hidden
            # states, whose graphs hold two inputs and their gradients.
            stays = job.bytes_per_number * num_sent(job) * (5 if has_head else 1 + (stage > 0))
            planned_state += stays + 4 * job.tokens * size * has_head
        # Of the loss's peak, the gradient of the head's weight is saved.
        planned_passes = plan.activations - stays + plan.adapters
        planned_passes += 4 * job.model.vocab_size / job.parallel.tensor * size * has_head
        if job.parallel.zero_stage == 2:
            planned_passes += 4 * job.num_trained(stage)  # of the backward pass before, in flight
        if job.parallel.zero_stage == 3:
            planned_passes += job.bytes_per_number * job.num_weights(stage)  # gathered, and saved by products
        errors = planned_state / state - 1, planned_passes / passes - 1
        print(f"{name} rank {rank}: {state:,} {errors[0]:+.1%} {passes:,} {errors[1]:+.1%}, {num_reductions}")
        assert planned_state == pytest.approx(state, rel=MAX_ERROR)
        assert planned_passes == pytest.approx(passes, rel=MAX_ERROR if job.parallel.zero_stage < 3 else 0.1)
        assert planned_state + planned_passes == pytest.approx(state + passes, rel=MAX_ERROR)
        if has_buckets(job, software):
            assert num_reductions == planned_reductions(job.num_trained(stage), job.replicas)
