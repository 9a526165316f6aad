"""Heartbeat of a rank: its step, its position in the code, whether it has ended."""

import os
import socket
import threading
import time
from pathlib import Path

import psutil
import torch.distributed as dist
from pydantic import BaseModel

from megafusion.resilience.watchdog.failures import describe
from megafusion.resilience.watchdog.stacks import locate_error, locate_process


class Heartbeat(BaseModel, frozen=True):
    """State of a rank as it is written to the store and into the dumped stacks, in JSON."""

    started: str
    """When the watchdog was made; every rank takes over rank 0's, which names the incident's files."""
    time: float
    """Seconds since 1970; no two heartbeats of a rank are equal."""
    host: str
    pid: int
    location: str
    """Step, phase and position in the code."""
    waits: bool
    """Whether the rank is in a collective, or one has failed."""
    end: str | None
    """How the watched block ended: "finished" or an exception; None while it runs."""
    left: bool
    """Whether the rank needs the store no longer: rank 0 has ended, or the stacks are dumped."""

    def process_state(self) -> str | None:
        """ "gone" or "stopped" if the rank's process is; None if it runs or is on another machine."""
        if self.host != socket.gethostname():
            return None
        try:
            state = psutil.Process(self.pid).status()
        except psutil.NoSuchProcess:
            return "gone"
        return {psutil.STATUS_ZOMBIE: "gone", psutil.STATUS_STOPPED: "stopped"}.get(state)


class LocalState:
    """State of this rank, shared by its threads. Times are seconds of watched running time.

    folder: of the stacks. interval: between two exchanges of heartbeats. silence: a rank is lost after so
    long without a heartbeat.
    """

    def __init__(self, folder: Path, interval: float, silence: float):
        self.folder, self.interval, self.silence = folder, interval, silence
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.started = time.strftime("%Y%m%d-%H%M%S")
        self.training_thread = threading.get_ident()
        self.now = 0.0
        self.beat, self.beat_at = (0, "start"), 0.0
        self.error: BaseException | None = None  # of a collective whose peer is lost
        self.error_at = 0.0
        self.end: str | None = None
        self.left = False

    def heartbeat(self) -> Heartbeat:
        step, phase = self.beat
        location = locate_error(self.error) if self.error else locate_process(self.training_thread)
        raised = f", which raised {describe(self.error)}" if self.error else ""
        return Heartbeat(
            started=self.started,
            time=time.time(),
            host=socket.gethostname(),
            pid=os.getpid(),
            location=f"step {step}, {phase}, {location}{raised}",
            waits=location.collective is not None,
            end=self.end,
            left=self.left,
        )
