"""Boxes: ranges of flattened parameters lie where they should in whole ones, for any shape and layout."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megafusion.checkpoint.chunks import Chunks, cut_range, is_covered
from megafusion.checkpoint.planners import ChunkSavePlanner
from megafusion.parallel.sharding import ShardSpan, ShardSpec

shapes = st.lists(st.integers(1, 5), max_size=4).map(tuple)


def place(whole: torch.Tensor, offsets: tuple, sizes: tuple) -> torch.Tensor:
    return whole[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))]


def whole_layout(shape: tuple) -> ShardSpec:
    return ShardSpec(torch.Size(shape), 0, (ShardSpan(0, 0, shape[0] if shape else 1),))


@st.composite
def ranges(draw) -> tuple[tuple, int, int]:
    shape = draw(shapes)
    numel = torch.Size(shape).numel()
    start = draw(st.integers(0, numel))
    return shape, start, draw(st.integers(start, numel))


@given(ranges())
def test_a_range_is_cut_into_few_boxes_that_are_it_exactly(given_range):
    shape, start, stop = given_range
    counts = torch.zeros(shape, dtype=torch.long)
    boxes = cut_range(shape, start, stop)
    seen = []
    for offsets, sizes in boxes:
        place(counts, offsets, sizes).add_(1)
        seen += place(torch.arange(counts.numel()).view(shape), offsets, sizes).flatten().tolist()
    expected = torch.zeros(counts.numel(), dtype=torch.long)
    expected[start:stop] = 1
    assert torch.equal(counts.flatten(), expected)
    assert seen == list(range(start, stop))  # in the order of the fragment
    assert len(boxes) <= max(1, 2 * len(shape) - 1)


@st.composite
def cut_parameters(draw) -> tuple[torch.Tensor, list[ShardSpec]]:
    """A whole parameter, and the layouts of two ranks that share it, each in up to two runs."""
    shape = draw(shapes.filter(len))
    dim = draw(st.integers(0, len(shape) - 1))
    borders = sorted({0, shape[dim], *draw(st.lists(st.integers(0, shape[dim]), max_size=4))})
    layouts = []
    for rank in range(2):
        runs, used = [], 0
        for begin, end in list(pairwise(borders))[rank::2]:
            runs.append(ShardSpan(used, begin, end - begin))
            used += end - begin
        if runs:
            layouts.append(ShardSpec(torch.Size(shape), dim, tuple(runs)))
    return torch.arange(torch.Size(shape).numel()).float().view(shape), layouts


@given(cut_parameters(), st.data())
def test_fragments_of_any_layout_make_up_the_whole_and_are_written_in_place(parameter, data):
    whole, layouts = parameter
    read = torch.full(whole.shape, -1.0)
    for layout in layouts:
        local = layout.shard(whole).flatten()
        inner = data.draw(st.lists(st.integers(0, len(local)), max_size=3))
        for start, stop in pairwise(sorted([0, len(local), *inner])):
            fragment = local[start:stop].clone()
            boxes = Chunks(fragment, start, layout)
            for box in boxes.boxes:
                place(read, box.offsets, box.values.shape).copy_(box.values)
                box.values.fill_(-2)  # a view: what is read into a box stands in the fragment
            assert (fragment == -2).all()
    assert torch.equal(read, whole)


@given(st.lists(st.integers(1, 4), max_size=3).map(tuple), st.data())
def test_coverage_is_what_counting_says(shape, data):
    boxes, counts = [], torch.zeros(shape, dtype=torch.long)
    for _ in range(data.draw(st.integers(0, 6))):
        offsets = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
        sizes = tuple(data.draw(st.integers(1, n - o)) for n, o in zip(shape, offsets, strict=True))
        boxes.append((offsets, sizes))
        place(counts, offsets, sizes).add_(1)
    assert is_covered(shape, boxes) == bool((counts > 0).all())


def plan(fragments: list[tuple[int, int]], shape: tuple) -> tuple[list, object]:
    """torch's plan where rank r holds elements [start, stop) of one parameter, and its list of tensors."""
    local = []
    for start, stop in fragments:
        planner = ChunkSavePlanner()
        planner.set_up_planner({"x": Chunks(torch.zeros(stop - start), start, whole_layout(shape))})
        local.append(planner.create_local_plan())
    return ChunkSavePlanner().create_global_plan(local)


@given(ranges(), st.data())
def test_copies_cut_differently_are_written_whole_and_equal_boxes_once(given_range, data):
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
        place(counts, chunk.offsets, chunk.sizes).add_(1)
    assert (counts > 0).all()


def test_equal_copies_are_written_once_and_shared_out():
    plans, _ = plan([(0, 12), (12, 30), (0, 12), (12, 30)], (6, 5))
    written = [[item.index.offset for item in rank.items] for rank in plans]
    assert sum(map(len, written)) == len(cut_range((6, 5), 0, 12)) + len(cut_range((6, 5), 12, 30))
    assert sum(map(bool, written)) > 2


def test_a_gap_is_a_defect():
    with pytest.raises(AssertionError, match="x: the ranks do not hold the whole of it"):
        plan([(0, 12), (13, 30)], (6, 5))
