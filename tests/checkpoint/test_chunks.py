"""Chunks: ranges of flattened parameters map to the right elements of whole ones, however sharded."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megafusion.checkpoint.chunks import Chunks, ChunkSavePlanner, chunk_bounds, is_covered
from megafusion.parallel.sharding import ShardSpan, ShardSpec

shapes = st.lists(st.integers(1, 5), max_size=4).map(tuple)


def view(whole: torch.Tensor, offsets: tuple, sizes: tuple) -> torch.Tensor:
    return whole[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))]


def whole_spec(shape: tuple) -> ShardSpec:
    return ShardSpec(torch.Size(shape), 0, (ShardSpan(0, 0, shape[0] if shape else 1),))


@st.composite
def ranges(draw) -> tuple[tuple, int, int]:
    shape = draw(shapes)
    numel = torch.Size(shape).numel()
    start = draw(st.integers(0, numel))
    return shape, start, draw(st.integers(start, numel))


@given(ranges())
def test_a_range_is_exactly_its_few_chunks(given_range):
    shape, start, stop = given_range
    counts = torch.zeros(shape, dtype=torch.long)
    chunks = chunk_bounds(shape, start, stop)
    seen = []
    for offsets, sizes in chunks:
        view(counts, offsets, sizes).add_(1)
        seen += view(torch.arange(counts.numel()).view(shape), offsets, sizes).flatten().tolist()
    expected = torch.zeros(counts.numel(), dtype=torch.long)
    expected[start:stop] = 1
    assert torch.equal(counts.flatten(), expected)
    assert seen == list(range(start, stop))  # in the order of the fragment
    assert len(chunks) <= max(1, 2 * len(shape) - 1)


@st.composite
def sharded_parameters(draw) -> tuple[torch.Tensor, list[ShardSpec]]:
    """A whole parameter, and the shard specs of two ranks, each of up to three spans."""
    shape = draw(shapes.filter(len))
    dim = draw(st.integers(0, len(shape) - 1))
    borders = sorted({0, shape[dim], *draw(st.lists(st.integers(0, shape[dim]), max_size=4))})
    specs = []
    for rank in range(2):
        spans, used = [], 0
        for begin, end in list(pairwise(borders))[rank::2]:
            spans.append(ShardSpan(used, begin, end - begin))
            used += end - begin
        if spans:
            specs.append(ShardSpec(torch.Size(shape), dim, tuple(spans)))
    return torch.arange(torch.Size(shape).numel()).float().view(shape), specs


@given(sharded_parameters(), st.data())
def test_fragments_of_any_shards_make_up_the_whole_and_are_views(parameter, data):
    whole, specs = parameter
    read = torch.full(whole.shape, -1.0)
    for spec in specs:
        local = spec.shard(whole).flatten()
        inner = data.draw(st.lists(st.integers(0, len(local)), max_size=3))
        for start, stop in pairwise(sorted([0, len(local), *inner])):
            fragment = local[start:stop].clone()
            for chunk in Chunks(fragment, start, spec).chunks:
                view(read, chunk.offsets, chunk.values.shape).copy_(chunk.values)
                chunk.values.fill_(-2)  # a view: reading into a chunk fills the fragment
            assert (fragment == -2).all()
    assert torch.equal(read, whole)


@given(st.lists(st.integers(1, 4), max_size=3).map(tuple), st.data())
def test_coverage_equals_counting(shape, data):
    chunks, counts = [], torch.zeros(shape, dtype=torch.long)
    for _ in range(data.draw(st.integers(0, 6))):
        offsets = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
        sizes = tuple(data.draw(st.integers(1, n - o)) for n, o in zip(shape, offsets, strict=True))
        chunks.append((offsets, sizes))
        view(counts, offsets, sizes).add_(1)
    assert is_covered(shape, chunks) == bool((counts > 0).all())


def plan(fragments: list[tuple[int, int]], shape: tuple) -> tuple[list, object]:
    """DCP's plan and metadata if rank r holds elements [start, stop) of one parameter."""
    local = []
    for start, stop in fragments:
        planner = ChunkSavePlanner()
        planner.set_up_planner({"x": Chunks(torch.zeros(stop - start), start, whole_spec(shape))})
        local.append(planner.create_local_plan())
    return ChunkSavePlanner().create_global_plan(local)


@given(ranges(), st.data())
def test_replicas_split_differently_are_written_completely_and_equal_chunks_once(given_range, data):
    shape, middle, other = given_range
    numel = torch.Size(shape).numel()
    third = data.draw(st.integers(0, numel))
    plans, metadata = plan(
        [(0, middle), (middle, numel), (0, third), (third, numel), (0, other), (other, numel)], shape
    )
    items = [item.index for rank in plans for item in rank.items]
    assert len(set(items)) == len(items)
    counts = torch.zeros(shape, dtype=torch.long)
    for chunk in metadata.state_dict_metadata["x"].chunks:
        view(counts, chunk.offsets, chunk.sizes).add_(1)
    assert (counts > 0).all()


def test_equal_replicas_are_written_once_and_by_several_ranks():
    plans, _ = plan([(0, 12), (12, 30), (0, 12), (12, 30)], (6, 5))
    written = [[item.index.offset for item in rank.items] for rank in plans]
    assert sum(map(len, written)) == len(chunk_bounds((6, 5), 0, 12)) + len(chunk_bounds((6, 5), 12, 30))
    assert sum(map(bool, written)) > 2


def test_a_gap_is_a_bug():
    with pytest.raises(AssertionError, match="x: the chunks of all ranks do not cover it"):
        plan([(0, 12), (13, 30)], (6, 5))
