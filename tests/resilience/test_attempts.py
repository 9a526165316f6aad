"""A run's starts: how each ended is known afterwards, and one that crashes at the same step stops."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from megafusion.errors import UserError
from megafusion.resilience import attempts as starts_module
from megafusion.resilience.attempts import Attempts, read_starts

HOLDER = """
import sys, time
from pathlib import Path
from megafusion.resilience.attempts import Starts
starts = Starts(Path(sys.argv[1]))
starts.claim()
starts.begin(1)
print("held", flush=True)
time.sleep(float(sys.argv[2]))
"""


@contextmanager
def held(folder, seconds: float) -> Iterator[subprocess.Popen]:
    """Another process holds the run, and ends after so long without a word."""
    command = [sys.executable, "-c", HOLDER, str(folder), str(seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def claimed(folder) -> Attempts:
    starts = Attempts(folder)
    starts.claim()
    return starts


def crash(folder, resumed_at: int, step: int) -> None:
    """A start that says nothing of its end; its lock goes with its process."""
    starts = claimed(folder)
    starts.refuse_crash_loop(3)
    starts.begin(1)
    starts.resumed(resumed_at)
    starts.at(step)
    starts._release()


def test_a_start_without_an_end_has_crashed_at_the_step_that_it_was_in(tmp_path):
    crash(tmp_path, 4, 7)
    (start,) = read_starts(tmp_path)
    assert (start["ended"], start["resumed_at"], start["step"]) == ("crashed", 4, 7)
    assert (start["is_open"], start["pid"]) == (True, os.getpid())
    starts = claimed(tmp_path)
    starts.begin(1)
    starts.resumed(6)
    starts.at(9)
    starts.end("preempted")
    first, second = read_starts(tmp_path)
    assert (first["step"], "is_open" in first) == (7, False)
    assert (second["ended"], second["step"]) == ("preempted", 9)


def test_three_crashes_at_one_step_are_enough_and_the_way_out_is_said(tmp_path):
    for _ in range(3):
        crash(tmp_path, 4, 7)
    starts = claimed(tmp_path)
    with pytest.raises(UserError, match=r"last 3 starts crashed at step 7.*health\.max_crashes=0") as found:
        starts.refuse_crash_loop(3)
    assert found.value.exit_status == 1
    starts.refuse_crash_loop(0)
    starts.refuse_crash_loop(4)


@pytest.mark.parametrize("between", ["progress", "preempted"])
def test_crashes_at_other_steps_or_with_an_ordinary_end_between_are_no_loop(tmp_path, between):
    for _ in range(2):
        crash(tmp_path, 4, 7)
    if between == "progress":
        crash(tmp_path, 4, 8)
    else:
        starts = claimed(tmp_path)
        starts.begin(1)
        starts.resumed(4)
        starts.end("preempted")
    crash(tmp_path, 4, 7)
    crash(tmp_path, 4, 7)
    claimed(tmp_path).refuse_crash_loop(3)


def test_an_error_is_told_with_the_refusal(tmp_path):
    starts = claimed(tmp_path)
    starts.begin(1)
    starts.resumed(0)
    starts.at(3)
    starts.end("crashed", "KeyError: 'x'")
    with pytest.raises(UserError, match=r"at step 3 \(KeyError: 'x'\)"):
        claimed(tmp_path).refuse_crash_loop(1)


def test_a_second_start_in_one_folder_is_refused_until_the_first_has_ended(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(starts_module, "ENDING_SECONDS", 0.3)
    with held(tmp_path, 60) as holder:
        with pytest.raises(UserError, match=rf"process {holder.pid} on .* trains in this folder") as found:
            Attempts(tmp_path).claim()
        assert found.value.exit_status == 1
        (start,) = read_starts(tmp_path)
        assert (start["pid"], start["is_open"]) == (holder.pid, True)
        assert f"held by process {holder.pid}" in capsys.readouterr().err
    claimed(tmp_path).end("refused")
    (start,) = read_starts(tmp_path)
    assert start["pid"] == holder.pid


def test_a_start_waits_for_one_that_is_ending(tmp_path):
    with held(tmp_path, 0.5):
        starts = claimed(tmp_path)
    starts.begin(1)
    starts.resumed(0)
    assert [start["ended"] for start in read_starts(tmp_path)] == ["crashed", "crashed"]


def test_one_that_holds_the_run_on_another_machine_is_worth_another_try(tmp_path, monkeypatch):
    monkeypatch.setattr(starts_module, "LOST_SECONDS", 0)
    with held(tmp_path, 60):
        (tmp_path / "starts.json").write_text(
            (tmp_path / "starts.json").read_text().replace(socket.gethostname(), "elsewhere")
        )
        with pytest.raises(UserError, match="on elsewhere trains in this folder") as found:
            Attempts(tmp_path).claim()
    assert found.value.exit_status == 75
