"""`prepare`: the transpose of the mask, the order of work, and the validation of intervals."""

import re
from pathlib import Path

import pytest
import torch

import interval_attention
from interval_attention import prepare
from interval_attention.intervals import RUN
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


def test_runs_come_longest_first_and_each_once():
    start, end = packed_rows(5, 4, 5 * RUN + 3)
    prepared = prepare(start, end)
    for order, low, high in (
        (prepared.row_order, start, end),
        (prepared.key_order, prepared.first_row, prepared.last_row),
    ):
        assert order.dtype == torch.int32
        assert sorted(order.tolist()) == list(range(4 * 6))
        work = []
        for run in order.tolist():
            row, first = run // 6, run % 6 * RUN
            work.append((high[row, first : first + RUN].amax() - low[row, first : first + RUN].amin()).item())
        assert work == sorted(work, reverse=True)


def test_memory_is_linear_in_the_length():
    """At S = 131,072 a dense mask would take 17 GB."""
    size = 131_072
    end = torch.arange(1, size + 1, dtype=torch.int32, device=DEVICE)[None]
    prepared = prepare(torch.zeros_like(end), end)
    assert sum(x.numel() for x in prepared) < 4 * size + size // 32


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
