"""Every form of parallelism gives the numbers of one device; `make test-parallel` runs the whole matrix."""

from pathlib import Path

import pytest

from megafusion.config import parse_config
from megafusion.train.config import RunConfig
from tests.parallel.cases import parallel_steps
from tests.parallel.matrix import CASES, Case, OneDevice
from tests.support.marks import full
from tests.support.workers import run_workers

# Each form of parallelism (with the linear adapter, of a model with every key that hub/ needs), ZeRO 3,
# recomputation, offloading, bf16, flow matching, LoRA in interleaved stages, weights and positions of image
# patches, codes, clean context.
QUICK = [
    "one",
    "dp2-zero3-linear",
    "tp2-sp-recompute-selective",
    "ulysses2-zero1-linear",
    "pp2-zero1-unet",
    "pp2-recompute-full",
    "dp2-zero1-offload",
    "dp2-zero2-bf16",
    "pp2-flow-sample",
    "pp2-v2-lora",
    "tp2-sp-modality-all",
    "ulysses2-rope-2d",
    "tp2-sp-aligned",
    "tp2-sp-quantized",
    "pp2-clean-flow-modality",
    "ulysses2-clean",
]
# Other stages, products of the degrees above, and recipes at other topologies.
FULL = [
    "pp2-lora",
    "pp2-v2-unet",
    "pp2-v2-zero0",
    "pp2-v2-bf16",
    "pp2-v2-frozen-start",
    "pp2-v2-dp2-linear",
    "pp4-v2",
    "tp2-sp-pp2-v2-unet",
    "ulysses2-pp2-v2-linear",
    "tp2-aligned",
    "ulysses2-aligned",
    "dp2-zero1-aligned",
    "dp2-zero3-aligned",
    "tp2-sp-rope-2d-unet",
    "pp2-rope-2d",
    "dp2-zero3-rope-2d",
    "tp2-pp2-rope-2d",
    "pp2-modality-all",
    "dp2-zero3-frozen",
    "tp2-sp-zero3-lora",
    "tp2-pp2-dp2-zero1-linear",
    "ulysses2-zero1-unet",
    "dp2-zero0-linear",
    "tp2-zero0-linear",
    "dp2-zero2-unet",
    "tp2-sp-zero3-linear",
    "ulysses2-zero2-linear",
    "pp2-zero0-linear",
    "tp2-dp2-zero1-linear",
    "tp2-pp2-zero1-unet",
    "pp2-dp2-zero1-linear",
    "ulysses2-tp2-sp-unet",
    "ulysses2-pp2-unet",
    "tp2-pp2-bf16",
    "tp2-sp-flow-sample",
    "tp2-sp-modality-feed_forward",
    "ulysses2-modality-all",
    "dp2-zero3-modality-all",
    "tp2-sp-frozen",
    "pp2-frozen",
    "ulysses2-frozen",
    "dp2-zero2-frozen-bf16",
    "tp2-zero0-adapters",
    "tp2-adapters",
    "tp2-zero3-adapters",
    "tp2-pp2-adapters",
    "tp2-adapters-bf16",
    "dp2-zero1-lora",
    "dp2-zero3-lora",
    "tp2-lora",
    "tp2-pp2-lora",
    "ulysses2-tp2-sp-lora",
    "pp2-causal",
    "tp2-quantized",
    "pp2-quantized",
    "ulysses2-quantized",
    "dp2-zero1-quantized",
    "dp2-zero3-quantized",
    "tp2-pp2-quantized",
    "tp2-sp-clean",
    "tp2-sp-clean-unet",
    "pp2-clean",
    "pp2-clean-unet",
    "dp2-zero1-clean",
    "dp2-zero3-clean-unet",
    "tp2-pp2-clean",
    "tp2-sp-clean-flow-modality",
    "ulysses2-clean-flow-modality",
    "dp2-zero3-clean-flow-modality",
]


@pytest.fixture(scope="module")
def one_device(shards, vae_folder, quantized_shards, vq_folder, tmp_path_factory) -> OneDevice:
    """Ten steps, two of each kind of batch; `make test-parallel` makes twenty."""
    quantized = quantized_shards, vq_folder
    return OneDevice((shards, vae_folder), quantized, tmp_path_factory.mktemp("matrix"), num_steps=10)


def test_every_case_of_the_matrix_is_a_run_of_its_ranks():
    for case in CASES.values():
        values = case.values(Path("shards"), Path("vae"), Path("run"))
        parse_config(RunConfig, values, case.name).check_degrees(case.world)


@pytest.mark.parametrize("name", [*QUICK, *full(*FULL)])
def test_equals_one_device(one_device, name):
    result = one_device.compare(CASES[name])
    assert result.holds, result


@pytest.mark.parametrize("name", full("ulysses2-zero2-linear", "tp2-pp2-zero1-unet", "tp2-sp-zero3-linear"))
def test_same_topology_and_seed_give_the_same_bits(shards, vae_folder, tmp_path, name):
    case = CASES[name]
    values = case.values(shards, vae_folder, tmp_path)
    first, second = (run_workers(parallel_steps, case.world, values, 5) for _ in range(2))
    assert [outcome.losses for outcome in first] == [outcome.losses for outcome in second]
    for one, other in zip(first, second, strict=True):
        for (name, _, value), (_, _, again) in zip(one.weights, other.weights, strict=True):
            assert (value == again).all(), name


# Stage 1 stands for stage 2, which partitions the same float32 gradients.
@pytest.mark.parametrize("stage", [1, *full(2, 3)])
def test_bf16_reduces_gradients_in_float32(shards, vae_folder, tmp_path, stage):
    """One rank and two have the same gradient norm on the same micro-batches; bf16 sums differ by 5e-5."""
    norms = []
    for world in (1, 2):
        case = Case(f"dp{world}-bf16", world, {"zero_stage": stage}, train={"precision": "bf16"})
        values = case.values(shards, vae_folder, tmp_path)
        norms.append(run_workers(parallel_steps, world, values, 1)[0].losses[0][-1])
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)
