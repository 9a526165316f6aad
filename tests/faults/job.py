"""A job of real processes, one per rank, that run the command line.

They are forked from a server that has imported torch, DeepSpeed and megafusion, so a start takes a second.
"""

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path

import torch
import yaml

from megafusion.checkpoint.folder import complete_checkpoints
from tests.support.runs import tensors
from tests.support.workers import PRELOAD

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(PRELOAD)


class Job:
    """The ranks of `megafusion train`, killed at the end of the block if they still run.

    inject: a module-level function, called with the rank in each process before the command.
    """

    def __init__(
        self, values: dict, world: int, *arguments: str, inject: Callable[[int], None] | None = None
    ):
        self.run = Path(values["out"])
        self.log = self.run.with_name(self.run.name + ".log")
        config = self.run.with_name(self.run.name + ".yaml")
        config.write_text(yaml.safe_dump(values))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = ["megafusion", "train", str(config), *arguments]
        self.processes = [
            _CONTEXT.Process(target=_rank, args=(rank, world, port, command, self.log, inject), daemon=False)
            for rank in range(world)
        ]
        self._log_began = self.log.stat().st_size if self.log.exists() else 0
        for process in self.processes:
            process.start()

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            if process.is_alive():
                process.kill()
            process.join()

    def output(self) -> str:
        """Output of the ranks since this start, on one line, because rich breaks lines."""
        text = self.log.read_bytes()[self._log_began :].decode() if self.log.exists() else ""
        return " ".join(text.split())

    def wait_for(self, condition: Callable[[], bool], seconds: float = 90) -> bool:
        """Wait for a condition until all ranks have exited or the time is over; returns whether it holds."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if condition():
                return True
            if not any(process.is_alive() for process in self.processes):
                return condition()
            time.sleep(0.001)
        return False

    def end(self, seconds: float = 120) -> list[int | None]:
        """Wait for all ranks and return their exit statuses; None for one that has not exited in time.

        After a failure the others are terminated, and killed 30 s later, as by DeepSpeed's launcher.
        """
        deadline = time.monotonic() + seconds
        is_terminated = False
        while alive := [process.sentinel for process in self.processes if process.is_alive()]:
            if not wait(alive, max(0, deadline - time.monotonic())):
                break
            if any(process.exitcode for process in self.processes) and not is_terminated:
                is_terminated, deadline = True, min(deadline, time.monotonic() + 31)
                time.sleep(1)
                for process in self.processes:
                    process.terminate()
        for process in self.processes:
            if is_terminated and process.is_alive():
                process.kill()
                process.join()
        return [process.exitcode for process in self.processes]


def _rank(rank: int, world: int, port: int, command: list[str], log: Path, inject: Callable | None) -> None:
    with log.open("ab", buffering=0) as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "COLUMNS": "200"}
    if world > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    sys.argv = command
    from megafusion.cli import main

    if inject:
        inject(rank)
    main()


def step_of_run(run: Path) -> int:
    """Current or last step of a run."""
    try:
        return int((run / "step").read_text())
    except (OSError, ValueError):
        return 0


def same_bits(a: Path, b: Path) -> bool:
    """Whether two checkpoints have bitwise identical weights, averages and moments."""
    first, second = tensors(a), tensors(b)
    return first.keys() == second.keys() and all(torch.equal(t, second[name]) for name, t in first.items())


def newest(run: Path) -> Path:
    return complete_checkpoints(run / "checkpoints")[-1]
