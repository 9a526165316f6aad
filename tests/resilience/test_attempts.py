"""Attempts of a run: how each ended, the lock of the run folder, and the rule for crash loops."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from megafusion.errors import ExitStatus, UserError
from megafusion.resilience import attempts as attempts_module
from megafusion.resilience.attempts import START, Attempts, read_attempts, refuse_crash_loop

HOLDER = """
import sys, time
from pathlib import Path
from megafusion.resilience.attempts import Attempts
attempts = Attempts(Path(sys.argv[1]))
attempts.claim()
attempts.begin(1, 0)
print("locked", flush=True)
time.sleep(float(sys.argv[2]))
"""


@contextmanager
def locked(folder, seconds: float) -> Iterator[subprocess.Popen]:
    """Another process has the run's lock, and dies after some seconds."""
    command = [sys.executable, "-c", HOLDER, str(folder), str(seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "locked\n"
        try:
            yield process
        finally:
            process.kill()


def begun(folder, newest_step: int) -> Attempts:
    attempts = Attempts(folder)
    attempts.claim()
    attempts.begin(1, newest_step)
    return attempts


def crash(folder, newest_step: int, step: int) -> None:
    """An attempt without a recorded end; its lock ends with its process."""
    attempts = begun(folder, newest_step)
    attempts.at(step)
    attempts._release()


def is_refused(folder, newest_step: int, max_crashes: int = 3) -> bool:
    try:
        refuse_crash_loop(folder, newest_step, max_crashes)
    except UserError:
        return True
    return False


def test_an_attempt_without_an_end_has_crashed_in_its_step(tmp_path):
    crash(tmp_path, 4, 7)
    (attempt,) = read_attempts(tmp_path)
    assert (attempt["ended"], attempt["resumed_at"], attempt["step"]) == ("crashed", 4, 7)
    assert (attempt["is_open"], attempt["pid"]) == (True, os.getpid())
    attempts = begun(tmp_path, 6)
    attempts.resumed(5)  # the newest checkpoint was damaged
    attempts.at(9)
    attempts.end("preempted")
    first, second = read_attempts(tmp_path)
    assert (first["step"], "is_open" in first) == (7, False)
    assert (second["ended"], second["resumed_at"], second["step"]) == ("preempted", 5, 9)


def test_attempts_of_an_earlier_version_are_read(tmp_path):
    (tmp_path / "starts.json").write_text(
        '[{"time": 1.0, "host": "a", "pid": 2, "world_size": 1, "changed": {}, "resumed_at": 4, "step": 7, '
        '"ended": "crashed"}]'
    )
    assert read_attempts(tmp_path)[0]["step"] == 7
    assert is_refused(tmp_path, 4, max_crashes=1)


def test_crashes_without_a_new_checkpoint_are_a_crash_loop(tmp_path):
    for step in (7, 9, 5):
        assert not is_refused(tmp_path, 4)
        crash(tmp_path, 4, step)
    with pytest.raises(UserError, match=r"last 3 attempts crashed .* step 4; .*\.max_crashes=0") as found:
        refuse_crash_loop(tmp_path, 4, 3)
    assert (found.value.exit_status, found.value.on_every_rank) == (ExitStatus.FAILED, True)
    assert not is_refused(tmp_path, 4, max_crashes=0)
    assert not is_refused(tmp_path, 4, max_crashes=4)
    assert not is_refused(tmp_path, 6)


@pytest.mark.parametrize("ended", ["preempted", "interrupted", "refused", "stopped"])
def test_an_attempt_that_ended_otherwise_breaks_the_loop(tmp_path, ended):
    for _ in range(2):
        crash(tmp_path, 4, 7)
    begun(tmp_path, 4).end(ended)
    for _ in range(2):
        crash(tmp_path, 4, 7)
    assert not is_refused(tmp_path, 4)
    crash(tmp_path, 4, 7)
    assert is_refused(tmp_path, 4)


def test_a_run_that_is_running_is_not_taken_for_crashed(tmp_path):
    for _ in range(2):
        crash(tmp_path, 0, 7)
    with locked(tmp_path, 60):
        assert not is_refused(tmp_path, 0)
    assert is_refused(tmp_path, 0)


def test_starts_that_died_before_they_were_recorded_count(tmp_path, monkeypatch):
    def start(number: int, launch: str = "7") -> bool:
        monkeypatch.setenv(START, f"{launch}:{number}")
        return is_refused(tmp_path, 0)

    assert [start(number) for number in (1, 2, 3, 4)] == [False, False, False, True]
    assert not start(3)
    crash(tmp_path, 0, 5)
    assert [start(number) for number in (4, 5, 6)] == [False, False, True]
    assert not start(1, launch="8")
    monkeypatch.delenv(START)
    assert not is_refused(tmp_path, 0)


def test_the_error_of_the_last_crash_is_part_of_the_message(tmp_path):
    begun(tmp_path, 0).end("crashed", "KeyError: 'x'")
    with pytest.raises(UserError, match=r"after step 0 \(KeyError: 'x'\)"):
        refuse_crash_loop(tmp_path, 0, 1)


def test_the_rule_loads_no_torch():
    script = "import sys, megafusion.resilience.attempts; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_second_attempt_in_a_folder_is_refused_until_the_first_has_ended(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(attempts_module, "WAIT_SECONDS", 0.3)
    with locked(tmp_path, 60) as holder:
        with pytest.raises(UserError, match=rf"process {holder.pid} on .* trains in this folder") as found:
            Attempts(tmp_path).claim()
        assert found.value.exit_status == ExitStatus.FAILED
        (attempt,) = read_attempts(tmp_path)
        assert (attempt["pid"], attempt["is_open"]) == (holder.pid, True)
        assert f"locked by process {holder.pid}" in capsys.readouterr().err
    attempts = Attempts(tmp_path)
    attempts.claim()
    attempts.end("refused")  # before it began, so there is nothing to record
    (attempt,) = read_attempts(tmp_path)
    assert attempt["pid"] == holder.pid


def test_an_attempt_waits_for_the_one_before_to_end(tmp_path):
    with locked(tmp_path, 0.5):
        begun(tmp_path, 0)
    assert [attempt["ended"] for attempt in read_attempts(tmp_path)] == ["crashed", "crashed"]


def test_a_lock_on_another_machine_is_worth_a_retry(tmp_path, monkeypatch):
    monkeypatch.setattr(attempts_module, "WAIT_SECONDS_REMOTE", 0)
    with locked(tmp_path, 60):
        record = tmp_path / "starts.json"
        record.write_text(record.read_text().replace(socket.gethostname(), "elsewhere"))
        with pytest.raises(UserError, match="on elsewhere trains in this folder") as found:
            Attempts(tmp_path).claim()
    assert found.value.exit_status == ExitStatus.RETRY
