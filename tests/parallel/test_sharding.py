"""A rank's parts: of what they are parts, and that they are all of it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megafusion.config import load_config
from megafusion.model.initialize import initialize
from megafusion.model.transformer import FusedLinear
from megafusion.model.transfusion import Transfusion
from megafusion.parallel.balance import layer_flops, stage_blocks
from megafusion.parallel.image_parallel import ImageShard
from megafusion.parallel.sharding import shard_spec_of
from megafusion.parallel.tensor import column_parallel, vocab_range
from megafusion.train.config import RunConfig
from tests.support.small import ROOT


@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.sampled_from([1, 2, 4]))
def test_fused_columns_are_each_layers_share(units, num_ranks):
    linear = FusedLinear(3, tuple(unit * 4 for unit in units))
    x = torch.randn(2, 3)
    parts = [column_parallel(linear, rank, num_ranks) for rank in range(num_ranks)]
    for part in parts:
        part.weight.data = shard_spec_of(part.weight).take(linear.weight.data)
    for whole, *divided in zip(linear(x), *(part(x) for part in parts), strict=True):
        torch.testing.assert_close(torch.cat(divided, -1), whole)


@given(st.integers(200, 40_000), st.sampled_from([1, 2, 4, 8]))
def test_every_word_has_one_rank(vocab_size, num_ranks):
    words = [vocab_range(vocab_size, rank, num_ranks) for rank in range(num_ranks)]
    assert [word for part in words for word in part] == list(range(vocab_size)) or vocab_size < 64 * num_ranks


def own_images(rank: int, num_ranks: int) -> ImageShard:
    own = object.__new__(ImageShard)
    own.rank, own.num_ranks = rank, num_ranks
    return own


@given(st.integers(1, 20), st.integers(1, 8))
def test_every_image_is_computed_once(num_slots, num_ranks):
    slots = torch.arange(1, num_slots + 1)
    ranks = [own_images(rank, num_ranks) for rank in range(num_ranks)]
    taken = [own.take(slots) for own in ranks]
    assert len({len(part) for part in taken}) == 1
    assert torch.equal(sum(own.put(part, num_slots) for own, part in zip(ranks, taken, strict=True)), slots)
    assert torch.equal(torch.cat(taken)[:num_slots], slots)


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
