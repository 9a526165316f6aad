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
        start, end = packed_rows(seed, 20, 30 + seed)
        prepared = prepare(start, end, check=True)
        row = torch.arange(start.shape[1], device=DEVICE)[:, None]
        seen = (row >= prepared.first_row[:, None]) & (row < prepared.last_row[:, None])
        some = (end > start)[..., None]
        assert torch.equal(seen & some, dense_mask(start, end, start.shape[1])[:, 0])


def test_runs_come_longest_first_with_the_bounds_of_their_parts():
    start, end = packed_rows(5, 4, 5 * RUN + 3)
    prepared = prepare(start, end)
    for schedule, low, high in (
        (prepared.row_schedule, start, end),
        (prepared.key_schedule, prepared.first_row, prepared.last_row),
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
    prepared = prepare(torch.zeros_like(end), end)
    assert sum(x.numel() for x in prepared) <= 5 * size


@pytest.mark.parametrize(
    ("start", "end", "message"),
    [
        ([0, 0, 0], [1, 2, 4], r"row_end\[0, 2\] is 4, outside 0 \.\. 3"),
        ([0, -1, 0], [1, 2, 3], r"row_start\[0, 1\] is -1, outside 0 \.\. 3"),
        ([0, 1, 0], [1, 2, 3], r"row_start\[0, 2\] is 0, less than 1 before it"),
    ],
)
def test_check_names_the_first_bad_value(start, end, message):
    start, end = (torch.tensor([x], dtype=torch.int32, device=DEVICE) for x in (start, end))
    with pytest.raises(ValueError, match=message):
        prepare(start, end, check=True)
    prepare(start, end)


def test_the_package_does_not_import_megafusion():
    for file in Path(interval_attention.__file__).parent.glob("*.py"):
        assert not re.search(r"^\s*(from|import) megafusion", file.read_text(), re.MULTILINE), file
