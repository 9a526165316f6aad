"""A stop signal before the ranks have connected."""

import os
import signal
import subprocess
import sys

import pytest

from megafusion.errors import ExitStatus
from megafusion.resilience.signals import STOPPED

WAITS = """
import time
from megafusion.resilience.signals import StopSignals
signals = StopSignals().listen()
print("listens", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("has_file", [True, False])
def test_a_process_exits_at_once_and_leaves_the_launchers_file(tmp_path, has_file):
    """By which three preemptions in a row, each during a start, are no crash loop."""
    stopped = tmp_path / "launch" / "stopped-7-1"
    if has_file:
        stopped.parent.mkdir()
    command = [sys.executable, "-c", WAITS]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | {STOPPED: str(stopped)}
    ) as process:
        assert process.stdout.readline() == "listens\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == ExitStatus.RETRY
    assert stopped.exists() == has_file
