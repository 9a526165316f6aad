"""A run's starts: how each ended is known afterwards, and one that crashes at the same step stops."""

import os

import pytest

from megafusion.errors import UserError
from megafusion.health.starts import Starts, read_starts


def crash(folder, resumed_at: int, step: int) -> None:
    """A start that says nothing of its end."""
    starts = Starts(folder)
    starts.refuse_crash_loop(3)
    starts.begin(resumed_at, 1)
    starts.at(step)


def test_a_start_without_an_end_has_crashed_at_the_step_that_it_was_in(tmp_path):
    crash(tmp_path, 4, 7)
    (start,) = read_starts(tmp_path)
    assert (start["ended"], start["resumed_at"], start["step"]) == ("crashed", 4, 7)
    assert (start["is_open"], start["pid"]) == (True, os.getpid())
    starts = Starts(tmp_path)
    starts.begin(6, 1)
    starts.at(9)
    starts.end("preempted")
    first, second = read_starts(tmp_path)
    assert (first["step"], "is_open" in first) == (7, False)
    assert (second["ended"], second["step"]) == ("preempted", 9)


def test_three_crashes_at_one_step_are_enough_and_the_way_out_is_said(tmp_path):
    for _ in range(3):
        crash(tmp_path, 4, 7)
    with pytest.raises(UserError, match=r"last 3 starts crashed at step 7.*health\.max_crashes=0") as found:
        Starts(tmp_path).refuse_crash_loop(3)
    assert found.value.exit_status == 1
    Starts(tmp_path).refuse_crash_loop(0)
    Starts(tmp_path).refuse_crash_loop(4)


@pytest.mark.parametrize("between", ["progress", "preempted"])
def test_crashes_at_other_steps_or_with_an_ordinary_end_between_are_no_loop(tmp_path, between):
    for _ in range(2):
        crash(tmp_path, 4, 7)
    if between == "progress":
        crash(tmp_path, 4, 8)
    else:
        starts = Starts(tmp_path)
        starts.begin(4, 1)
        starts.end("preempted")
    crash(tmp_path, 4, 7)
    crash(tmp_path, 4, 7)
    Starts(tmp_path).refuse_crash_loop(3)


def test_an_error_is_told_with_the_refusal(tmp_path):
    starts = Starts(tmp_path)
    starts.begin(0, 1)
    starts.at(3)
    starts.end("crashed", "KeyError: 'x'")
    with pytest.raises(UserError, match=r"at step 3 \(KeyError: 'x'\)"):
        Starts(tmp_path).refuse_crash_loop(1)
