"""The plan's memory is what ranks of this repository really hold, on CPUs."""

from dataclasses import replace

import pytest

from megafusion.commands.plan import job_of
from megafusion.config import parse_config
from megafusion.plan.memory import stage_memory
from megafusion.plan.software import of_run
from megafusion.train.config import RunConfig
from tests.parallel.matrix import Case
from tests.plan.ranks import held
from tests.support.workers import run_workers

CASES = {
    "one-zero0": (1, {"zero_stage": 0}, "fp32"),
    "one-bf16": (1, {}, "bf16"),
    "dp2-zero1": (2, {}, "bf16"),
    "dp2-zero2": (2, {"zero_stage": 2}, "bf16"),
    "dp2-zero3": (2, {"zero_stage": 3}, "bf16"),
    "tp2": (2, {"tensor": 2}, "bf16"),
    "tp2-sequence": (2, {"tensor": 2, "sequence": True}, "bf16"),
    "pp2": (2, {"pipeline": 2}, "bf16"),
    "ulysses2": (2, {"ulysses": 2}, "bf16"),
    "tp2-pp2": (4, {"tensor": 2, "pipeline": 2}, "bf16"),
    "tp2-dp2-zero3": (4, {"tensor": 2, "zero_stage": 3}, "bf16"),
    "unet": (1, {}, "fp32"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_rank_holds_what_is_planned(shards, vae_folder, tmp_path, name):
    world, degrees, precision = CASES[name]
    adapter = "unet" if name == "unet" else "linear"
    values = Case(name, world, degrees, adapter, {"precision": precision}).values(shards, vae_folder, tmp_path)
    values["model"] |= {"hidden_size": 128, "ffn_hidden_size": 512, "num_layers": 4, "num_heads": 4}
    job = job_of(parse_config(RunConfig, values, "test"), world)
    software = replace(of_run(job.train, "interval"), fuses_norms=False)
    for rank, measured in enumerate(run_workers(held, world, values)):
        stage = rank * job.parallel.pipeline // world
        plan = stage_memory(job, software, stage)
        # The loss keeps one of the three.
        saved = plan.activations + plan.adapters + plan.logits / 3
        print(name, rank, measured, "planned", round(plan.state), round(saved), {k: round(v) for k, v in plan.parts().items()})
