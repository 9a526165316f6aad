"""The plan against published figures of other trainers that it was not fitted to."""

from tests.plan.peers import PROJECTS, ROWS, comparisons, table
from tests.support.small import ROOT


def test_each_project_has_one_row_that_sets_its_rate():
    for project in PROJECTS:
        assert sum(row.calibrates for row in ROWS if row.project == project) == 1


def test_speeds_of_three_projects_are_within_15_percent():
    near = [c for c in comparisons() if not c.row.calibrates and abs(c.tokens_error) <= 0.15]
    assert len(near) >= 8
    assert len({c.row.project for c in near}) >= 3


def test_memory_of_four_rows_is_within_10_percent():
    near = [c for c in comparisons() if c.gib_error is not None and abs(c.gib_error) <= 0.10]
    assert len(near) >= 4


def test_the_page_has_this_table():
    assert table() in (ROOT / "docs/scaling.md").read_text()
