"""With images of several sizes, every form of parallelism gives the numbers of one device."""

from collections import deque
from dataclasses import replace

import pytest
import torch

from megafusion.config import parse_config
from megafusion.engine.process_group import start_process_group
from megafusion.model.transfusion import Transfusion
from megafusion.parallel.mesh import Mesh, make_mesh
from megafusion.parallel.parallelize import parallelize, shard_objective
from megafusion.parallel.pipeline import ModelWithLoss, Stage
from megafusion.train.build import build_components
from megafusion.train.config import RunConfig
from tests.parallel.cases import (
    Outcome,
    loss_error,
    norm_error,
    parallel_steps,
    parameter_error,
    plain_steps,
)
from tests.parallel.matrix import MAX_LOSS_ERROR, MAX_NORM_ERROR, MAX_PARAMETER_ERROR, Case
from tests.support.marks import full
from tests.support.sizes import mixed_run
from tests.support.workers import run_workers

NUM_STEPS = 6
"""One has only text, one only images, and in one the ranks differ."""
# Adapters with the sequence sharded stand for the others.
CASES = [
    Case("tp2-sp-unet", 2, {"tensor": 2, "sequence": True}, "unet"),
]
FULL = [
    Case("pp2-unet", 2, {"pipeline": 2}, "unet"),
    Case("dp2-zero3-unet", 2, {"zero_stage": 3}, "unet"),
    Case("dp2-zero2-linear", 2, {"zero_stage": 2}),
    Case("tp2-linear", 2, {"tensor": 2, "zero_stage": 0}),
    Case("ulysses2-unet", 2, {"ulysses": 2}, "unet"),
    Case("tp2-pp2-unet", 4, {"tensor": 2, "pipeline": 2}, "unet"),
]


def values_of(case: Case, paths: tuple) -> dict:
    values, mixed = case.values(*paths), mixed_run(*paths)
    for key in ("image_sizes", "vocab_size"):
        values["model"][key] = mixed["model"][key]
    return values


@pytest.fixture(scope="module")
def paths(mixed_shards, vae_folder, tmp_path_factory) -> tuple:
    return mixed_shards, vae_folder, tmp_path_factory.mktemp("mixed") / "run"


@pytest.fixture(scope="module")
def plain(paths) -> dict[str, Outcome]:
    """Outcomes of the plain model by adapter, each computed when first asked for."""

    class Plain(dict):
        def __missing__(self, adapter: str) -> Outcome:
            values = values_of(Case("plain", 1, {}, adapter), paths)
            self[adapter] = run_workers(plain_steps, 1, values, NUM_STEPS)[0]
            return self[adapter]

    return Plain()


@pytest.mark.parametrize("case", [*CASES, *full(*FULL)], ids=lambda case: case.name)
def test_equals_one_device(plain, paths, case):
    outcomes = run_workers(parallel_steps, case.world, values_of(case, paths), NUM_STEPS)
    true = plain[case.adapter]
    assert true.losses[2][1] == 0 < true.losses[3][1]
    assert max(loss_error(outcome, true) for outcome in outcomes) < MAX_LOSS_ERROR
    assert max(norm_error(outcome, true) for outcome in outcomes) < MAX_NORM_ERROR
    assert parameter_error(outcomes, true) < MAX_PARAMETER_ERROR


META = torch.device("meta")


def gradients_on_meta(values: dict) -> bool:
    """Whether all gradients of a micro-batch on the meta device are there."""
    config, stage, mesh = stage_on_meta(values)
    losses = shard_objective(config.objective, config.model, mesh).to(META)
    batch = build_components(config, mesh).loader.next()[0]
    ModelWithLoss(stage, losses)(batch.to(META)).total.backward()
    return all(parameter.grad.is_meta for parameter in stage.parameters())


def stage_gradients_on_meta(values: dict) -> bool:
    """The same of a stage of two, whose inputs and image sizes are on the device, too."""
    config, stage, mesh = stage_on_meta(values)
    batch = build_components(config, mesh).loader.next()[0]
    stage.image_sizes = deque([batch.image_size])
    if stage.stem is not None:
        floats, _ = stage(replace(batch, image_size=batch.image_size.to(META)).to(META).inputs())
        floats.sum().backward()
    else:
        num_rows, num_slots = batch.t.shape
        size = batch.tokens.numel() * config.model.hidden_size + sum(s.numel() for s in stage.skip_shapes)
        floats = torch.zeros(size, device=META, requires_grad=True)
        integers = torch.zeros(4 * batch.tokens.numel() + 3 * num_rows * num_slots, dtype=torch.int32)
        hidden_BSD, images = stage((floats, integers.to(META)))
        (hidden_BSD.sum() + images.sum()).backward()
        assert floats.grad.is_meta
        stage.head.weight.grad = torch.zeros_like(stage.head.weight)  # of the losses
    return all(parameter.grad.is_meta for parameter in stage.parameters())


def stage_on_meta(values: dict) -> tuple[RunConfig, Stage, Mesh]:
    start_process_group()
    config, device = parse_config(RunConfig, values, "test"), META
    mesh = make_mesh(config.parallel)
    with device:
        model = Transfusion(config.model, config.objective)
    stage = parallelize(
        model,
        mesh,
        shape=config.sequence_shape,
        micro_batch_size=config.train.micro_batch_size,
        precision="fp32",
        recompute="none",
        compile=False,
        seed=0,
        device=device,
    )
    return config, stage, mesh


def test_a_micro_batch_reads_nothing_from_the_device(paths):
    """Tensors of the meta device have no values: reading one raises."""
    (found,) = run_workers(gradients_on_meta, 1, values_of(Case("meta", 1, {}, "unet"), paths))
    assert found


def test_a_pipelines_stages_read_nothing_from_the_device(paths):
    case = Case("meta", 2, {"pipeline": 2}, "unet")
    assert all(run_workers(stage_gradients_on_meta, 2, values_of(case, paths)))
