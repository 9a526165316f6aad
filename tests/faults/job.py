"""A job of real processes, one a rank, that run the command line; hurt from outside, and its run looked at.

They are forked from a server that has loaded torch, DeepSpeed and megafusion once, so a start takes a second.
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
import torch.distributed.checkpoint as dcp
import yaml

from megafusion.checkpoint.folder import complete_checkpoints

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["megafusion.train.loop", "deepspeed.runtime.zero.muon.muon_optimizer"])


class Job:
    """The ranks of `megafusion train`. All are killed as the block ends, if they still run.

    hurt: called in each rank, with its number, before the command; of a module's top level.
    """

    def __init__(self, values: dict, world: int, *arguments: str, hurt: Callable[[int], None] | None = None):
        self.run = Path(values["out"])
        self.log = self.run.with_name(self.run.name + ".log")
        config = self.run.with_name(self.run.name + ".yaml")
        config.write_text(yaml.safe_dump(values))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = ["megafusion", "train", str(config), *arguments]
        self.processes = [
            _CONTEXT.Process(target=_rank, args=(rank, world, port, command, self.log, hurt), daemon=False)
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

    def said(self) -> str:
        """What the ranks have printed since this start, on one line: rich breaks lines at will."""
        text = self.log.read_bytes()[self._log_began :].decode() if self.log.exists() else ""
        return " ".join(text.split())

    def wait_for(self, what: Callable[[], bool], seconds: float = 90) -> bool:
        """Whether something comes about before the ranks end, or the time does."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if what():
                return True
            if not any(process.is_alive() for process in self.processes):
                return what()
            time.sleep(0.001)
        return False

    def end(self, seconds: float = 120) -> list[int | None]:
        """Exit statuses, once all have ended; None for one that has not in time.

        Where one has failed, the others are asked to end, and killed 30 s later, as by DeepSpeed's launcher.
        """
        deadline = time.monotonic() + seconds
        is_told = False
        while alive := [process.sentinel for process in self.processes if process.is_alive()]:
            if not wait(alive, max(0, deadline - time.monotonic())):
                break
            if any(process.exitcode for process in self.processes) and not is_told:
                is_told, deadline = True, min(deadline, time.monotonic() + 31)
                time.sleep(1)
                for process in self.processes:
                    process.terminate()
        for process in self.processes:
            if is_told and process.is_alive():
                process.kill()
                process.join()
        return [process.exitcode for process in self.processes]


def _rank(rank: int, world: int, port: int, command: list[str], log: Path, hurt: Callable | None) -> None:
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

    if hurt:
        hurt(rank)
    main()


def step_of_run(run: Path) -> int:
    """The step that a run is in, or was."""
    try:
        return int((run / "step").read_text())
    except (OSError, ValueError):
        return 0


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint."""
    stored = dcp.FileSystemReader(checkpoint / "tensors").read_metadata().state_dict_metadata
    found = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in stored.items()}
    dcp.load(found, checkpoint_id=checkpoint / "tensors", no_dist=True)
    return found


def same_bits(a: Path, b: Path) -> bool:
    """Whether two checkpoints hold the same weights, averages and moments, bit for bit."""
    first, second = tensors(a), tensors(b)
    return first.keys() == second.keys() and all(torch.equal(t, second[name]) for name, t in first.items())


def newest(run: Path) -> Path:
    return complete_checkpoints(run / "checkpoints")[-1]
