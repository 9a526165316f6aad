"""Shards, stages and random starts: every element is on some rank, with its value of the whole model."""

from itertools import combinations, pairwise
from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.utils import partition_balanced
from hypothesis import given
from hypothesis import strategies as st

from megafusion.config import load_config
from megafusion.model.transformer import FusedLinear
from megafusion.model.transfusion import Transfusion
from megafusion.parallel.balance import layer_flops
from megafusion.parallel.image_parallel import ImageShard
from megafusion.parallel.partition import partition, stage_blocks
from megafusion.parallel.sharding import shard_spec_of
from megafusion.parallel.tensor import ColumnParallelLinear, vocab_range
from megafusion.train.config import RunConfig
from tests.support.small import ROOT
from tests.support.weights import initialize


@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.sampled_from([1, 2, 4]), st.booleans())
def test_column_parallel_shards_each_fused_layer(units, num_ranks, bias):
    linear = FusedLinear(3, tuple(unit * 4 for unit in units), bias=bias)
    x = torch.randn(2, 3)
    outputs = []
    for rank in range(num_ranks):
        region = SimpleNamespace(rank=rank, num_ranks=num_ranks, gather_or_copy=lambda x: x)
        sharded = ColumnParallelLinear(linear, region)
        for name, parameter in sharded.named_parameters():
            parameter.data = shard_spec_of(parameter).shard(getattr(linear, name).data)
        outputs.append(sharded(x).split(sharded.sizes, -1))
    for whole, *shards in zip(linear(x).split(linear.sizes, -1), *outputs, strict=True):
        torch.testing.assert_close(torch.cat(shards, -1), whole)


@given(st.integers(200, 40_000), st.sampled_from([1, 2, 4, 8]))
def test_every_token_has_one_rank(vocab_size, num_ranks):
    shards = [vocab_range(vocab_size, rank, num_ranks) for rank in range(num_ranks)]
    assert [t for shard in shards for t in shard] == list(range(vocab_size)) or vocab_size < 64 * num_ranks


def image_shard(rank: int, num_ranks: int) -> ImageShard:
    shard = object.__new__(ImageShard)
    shard.rank, shard.num_ranks = rank, num_ranks
    return shard


@given(st.integers(1, 20), st.integers(1, 8))
def test_every_image_is_computed_once(num_slots, num_ranks):
    slots = torch.arange(1, num_slots + 1)
    shards = [image_shard(rank, num_ranks) for rank in range(num_ranks)]
    local = [shard.shard(slots) for shard in shards]
    assert len({len(part) for part in local}) == 1
    padded = [shard.pad(part, num_slots) for shard, part in zip(shards, local, strict=True)]
    assert torch.equal(sum(padded), slots)
    assert torch.equal(torch.cat(local)[:num_slots], slots)


def test_a_start_depends_on_seed_and_name_alone():
    config = load_config(
        RunConfig, ROOT / "configs/quickstart.yaml", ["model.adapter=unet", "model.unet_channels=8"]
    )
    first, second, other, short = (
        Transfusion(config.model.model_copy(update=changes), config.objective)
        for changes in ({}, {}, {}, {"num_layers": 2})
    )
    for model, seed in ((first, 0), (second, 0), (other, 1), (short, 0)):
        initialize(model, 6, seed)
    values = dict(first.named_parameters())
    for name, value in second.named_parameters():
        assert torch.equal(value, values[name])
    for name, value in short.named_parameters():
        assert torch.equal(value, values[name])
    random = [name for name, value in values.items() if value.std() > 0]
    assert len(random) > 60
    assert all(not torch.equal(dict(other.named_parameters())[name], values[name]) for name in random)
    for name, value in values.items():
        if "norm" in name:
            assert (value == (0 if name.endswith("bias") else 1)).all(), name
    # As PyTorch starts convolutions: uniform within 1 / sqrt(inputs).
    convolution = values["stem.adapter.blocks.0.conv1.weight"]
    bound = convolution[0].numel() ** -0.5
    assert bound * 0.95 < convolution.abs().max() <= bound


def slowest(costs: list[int], stages: list[range]) -> int:
    return max(sum(costs[i] for i in stage) for stage in stages)


def deepspeed_partition(costs: list[int], num_parts: int) -> list[range]:
    bounds = [int(bound) for bound in partition_balanced(costs, num_parts)]
    return [range(start, stop) for start, stop in pairwise(bounds)]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=9), st.integers(1, 5))
def test_no_partition_has_a_faster_slowest_part(costs, num_parts):
    num_parts = min(num_parts, len(costs))
    parts = partition(costs, num_parts)
    assert [i for part in parts for i in part] == list(range(len(costs)))
    assert len(parts) == num_parts
    assert all(parts)
    cuts = combinations(range(1, len(costs)), num_parts - 1)
    every = [[range(*bounds) for bounds in pairwise((0, *cut, len(costs)))] for cut in cuts]
    assert slowest(costs, parts) == min(slowest(costs, other) for other in every)
    # DeepSpeed's minimizes the largest cost less the smallest, so its slowest part may be slower.
    assert slowest(costs, parts) <= slowest(costs, deepspeed_partition(costs, num_parts))


def test_stages_of_the_configurations_are_those_of_deepspeed():
    paths = [*(ROOT / "configs").glob("*.yaml"), *(ROOT / "configs/baselines").glob("*.yaml")]
    assert len(paths) > 9
    for path in paths:
        config = load_config(RunConfig, path)
        stem, *blocks, tail = costs = layer_flops(config.model, config.sequence_shape)
        blocks[0] += stem
        blocks[-1] += tail
        for num_stages in (2, 3, 4, 8, 16):
            if num_stages <= len(blocks):
                assert stage_blocks(costs, num_stages) == deepspeed_partition(blocks, num_stages), path


def test_stages_count_the_unet_and_the_vocabulary():
    plain = load_config(RunConfig, ROOT / "configs/7b.yaml")
    unet = load_config(RunConfig, ROOT / "configs/baselines/7b-unet-8x8.yaml")
    stem, block, *_, tail = layer_flops(plain.model, plain.sequence_shape)
    width, length = 4096, 4096
    products = 2 * length * (4 * width**2 + 3 * width * 11008)
    attention = 2 * 2 * length**2 * width
    assert block == pytest.approx(products + attention, rel=1e-3)
    assert tail == pytest.approx(2 * length * width * 32002, rel=0.01)
    assert stem < 0.01 * block
    costs = layer_flops(unet.model, unet.sequence_shape)
    assert costs[0] > 2 * costs[1]
    assert costs[-1] > 5 * costs[1]
    for num_stages in (1, 2, 4, 8):
        stages = stage_blocks(costs, num_stages)
        assert [number for stage in stages for number in stage] == list(range(32))
        assert all(stages)
    heaviest = [sum(costs[1 + n] for n in stage) for stage in stage_blocks(costs, 4)]
    heaviest[0] += costs[0]
    heaviest[-1] += costs[-1]
    assert max(heaviest) < 1.15 * sum(costs) / 4
