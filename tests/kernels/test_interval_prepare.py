"""`prepare`: the transpose of the mask, the order of work, and the validation of intervals."""

import re
from pathlib import Path

import pytest
import torch

import interval_attention
from interval_attention import prepare
from interval_attention.intervals import FAR, RUN
from interval_attention.reference import dense_mask
from tests.support.layouts import DEVICE, packed_rows, rows_with_holes


def test_column_bounds_are_the_transpose_on_200_layouts():
    for seed in range(10):
        end, last = packed_rows(seed, 20, 30 + seed)
        prepared = prepare(end, last, check=True)
        at = torch.arange(end.shape[1], device=DEVICE)
        by_keys = (at[:, None] >= prepared.first_query[:, None]) & (at[:, None] < last[:, None])
        by_rows = (at >= prepared.row_start[..., None]) & (at < end[..., None])
        seen = dense_mask(end, last)[:, 0]
        assert torch.equal(by_keys & seen.any(2, keepdim=True), seen)
        assert torch.equal(by_rows, seen)


def test_rows_have_one_hole_each_in_400_layouts_with_noised_copies():
    for seed in range(20):
        end, last = rows_with_holes(seed, 20, 40 + 9 * seed)
        prepared = prepare(end, last, has_holes=True, check=True)
        at = torch.arange(end.shape[1], device=DEVICE)
        hole_start, hole_end = prepared.holes[..., None]
        in_hole = (at >= hole_start) & (at < hole_end)
        by_rows = (at >= prepared.row_start[..., None]) & (at < end[..., None]) & ~in_hole
        by_keys = (at[:, None] >= prepared.first_query[:, None]) & (at[:, None] < last[:, None])
        seen = dense_mask(end, last)[:, 0]
        assert torch.equal(by_rows, seen)
        assert torch.equal(by_keys, seen)
        assert in_hole.any(-1).float().mean() > 0.05
        # What a tile skips, no row of it sees; and it does not visit more than its rows see by a hole's ends.
        schedule, fields = prepared.row_schedule, slice(8, 16)
        for b, run in [(b, run) for b in range(20) for run in range(schedule.shape[1])]:
            for part, (low, _, _, high, skipped, past, first, last_hole) in enumerate(
                schedule[b, run, fields].tolist()
            ):
                rows = slice(*(int(schedule[b, run, 0, 0]) * RUN + RUN // 8 * n for n in (part, part + 1)))
                visited = seen[b, rows].any(0).nonzero()[:, 0].tolist()
                if visited:
                    assert (visited[0], visited[-1] + 1) == (low, high)
                    assert not any(skipped <= key < past for key in visited)
                    if past < high:
                        assert past in visited
                        assert skipped == low or skipped - 1 in visited
                    outside = (at < first) | (at >= last_hole)
                    assert not (in_hole[b, rows] & outside).any()


def test_rows_of_more_than_two_runs_are_refused():
    """A noised image beside its clean copy: what comes after sees the clean one alone."""
    end = torch.tensor([[1, 3, 3, 5, 5, 6]], dtype=torch.int32)
    last = torch.tensor([[6, 3, 3, 6, 6, 6]], dtype=torch.int32)
    with pytest.raises(
        ValueError, match=r"row 0: 17 visible pairs by row_end and last_query, but .* with one hole a row"
    ):
        prepare(end, last, has_holes=True, check=True)


def test_runs_come_longest_first_with_the_bounds_of_their_parts():
    prepared = prepare(*packed_rows(5, 4, 5 * RUN + 3))
    for schedule, low, high in (
        (prepared.row_schedule, prepared.row_start, prepared.row_end),
        (prepared.key_schedule, prepared.first_query, prepared.last_query),
    ):
        assert schedule.dtype == torch.int32
        assert schedule.shape == (4, 6, 16, 4)
        for row, runs in enumerate(schedule.tolist()):
            assert sorted(run[0][0] for run in runs) == list(range(6))
            work = [most_end - least_start for _, (least_start, _, _, most_end), *_ in runs]
            assert work == sorted(work, reverse=True)
            for run in runs:
                for num_parts in (1, 2, 4, 8):
                    for part in range(num_parts):
                        first = run[0][0] * RUN + part * RUN // num_parts
                        at = slice(first, first + RUN // num_parts)
                        some = high[row, at] > low[row, at]
                        starts, ends = low[row, at][some].tolist(), high[row, at][some].tolist()
                        expected = [
                            min(starts, default=FAR), max(starts, default=0),
                            min(ends, default=FAR), max(ends, default=0),
                        ]  # fmt: skip
                        assert run[num_parts + part] == expected


def test_memory_is_linear_in_the_length():
    """At S = 131,072 a dense mask would take 17 GB."""
    size = 131_072
    end = torch.arange(1, size + 1, dtype=torch.int32, device=DEVICE)[None]
    prepared = prepare(end)
    assert sum(x.numel() for x in prepared if x is not None) <= 5 * size


@pytest.mark.parametrize(
    ("end", "last", "message"),
    [
        ([1, 2, 4], [3, 3, 3], r"row_end\[0, 2\] is 4, outside 0 \.\. 3"),
        ([1, 2, 3], [1, -1, 3], r"last_query\[0, 1\] is -1, outside 0 \.\. 3"),
        ([1, 2, 3], [1, 3, 2], r"last_query\[0, 2\] is 2, less than 3 before it"),
    ],
)
def test_check_names_the_first_bad_value(end, last, message):
    end, last = (torch.tensor([x], dtype=torch.int32, device=DEVICE) for x in (end, last))
    with pytest.raises(ValueError, match=message):
        prepare(end, last, check=True)
    prepare(end, last)


def test_the_package_does_not_import_megafusion():
    for file in Path(interval_attention.__file__).parent.glob("*.py"):
        assert not re.search(r"^\s*(from|import) megafusion", file.read_text(), re.MULTILINE), file
