"""Heartbeat of a rank: its step, its position in the code, whether it has ended."""

import json
import os
import socket
import threading
import time
from dataclasses import asdict, dataclass

import psutil
import torch.distributed as dist

from megafusion.resilience.watchdog.failures import describe
from megafusion.resilience.watchdog.stacks import locate_error, locate_process


@dataclass(frozen=True)
class Heartbeat:
    """State of a rank as it is written to the store and into the dumped stacks."""

    started: str
    """When the watchdog was made; every rank takes over rank 0's, which names the incident's files."""
    time: float
    """Seconds since 1970; no two heartbeats of a rank are equal."""
    host: str
    pid: int
    step: int
    phase: str
    collective: str | None
    """The collective that the rank waits in, or that failed."""
    where: str
    """Line of this package that called the collective, or that runs."""
    inside: str | None
    """The innermost frame, unless that is this package's or a collective's."""
    raised: str | None
    """Error of the collective whose peer is lost."""
    end: str | None
    """How the watched block ended: "finished" or an exception; None while it runs."""
    left: bool
    """Whether the rank knows that rank 0 has ended, and needs the store no longer."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> "Heartbeat":
        return cls(**json.loads(text))

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
    """State of this rank, shared by its threads. Times are seconds of watched running time."""

    def __init__(self) -> None:
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
        return Heartbeat(
            started=self.started,
            time=time.time(),
            host=socket.gethostname(),
            pid=os.getpid(),
            step=step,
            phase=phase,
            **location._asdict(),
            raised=describe(self.error) if self.error else None,
            end=self.end,
            left=self.left,
        )
