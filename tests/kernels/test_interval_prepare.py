"""`prepare`: the transpose of the mask, the order of work, and the validation of intervals."""

import re
from pathlib import Path

import pytest
import torch

import interval_attention
from interval_attention import prepare
from interval_attention.intervals import FAR, RUN
from interval_attention.reference import dense_mask
from tests.support.layouts import DEVICE, packed_rows


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
    assert sum(x.numel() for x in prepared) <= 5 * size


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
