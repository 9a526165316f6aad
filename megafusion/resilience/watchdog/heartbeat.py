"""What a rank says of itself."""

import json
import os
import socket
import threading
import time
from dataclasses import asdict, dataclass

import psutil
import torch.distributed as dist

from megafusion.resilience.watchdog.failures import describe
from megafusion.resilience.watchdog.stacks import place_of_error, place_of_process


@dataclass(frozen=True)
class Heartbeat:
    """Where a rank is, and whether it goes on."""

    started: str
    """When its watchdog was made; rank 0's, once a rank has heard of it, names the incident for all."""
    time: float
    """Of this heartbeat, in seconds since 1970: no two of a rank are equal."""
    host: str
    pid: int
    step: int
    phase: str
    collective: str | None
    """The collective that it waits in, or that failed."""
    where: str
    """Line of our code that called it, or that runs."""
    inside: str | None
    """The innermost frame, where that is not ours and no collective."""
    raised: str | None
    """What the collective raised whose peer is gone."""
    end: str | None
    """How the watched block ended, once it has: "finished" or an exception."""
    left: bool
    """Whether it knows that rank 0 has ended, and needs no store any more."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> "Heartbeat":
        return cls(**json.loads(text))

    def process_state(self) -> str | None:
        """ "gone" or "stopped" where the rank's process is that; None where it runs or on another machine."""
        if self.host != socket.gethostname():
            return None
        try:
            state = psutil.Process(self.pid).status()
        except psutil.NoSuchProcess:
            return "gone"
        return {psutil.STATUS_ZOMBIE: "gone", psutil.STATUS_STOPPED: "stopped"}.get(state)


class LocalState:
    """This rank, as its threads know it; times are seconds that this process ran while it was watched."""

    def __init__(self):
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.started = time.strftime("%Y%m%d-%H%M%S")
        self.thread = threading.get_ident()  # the one that trains
        self.now = 0.0
        self.beat, self.beat_at = (0, "start"), 0.0
        self.error: BaseException | None = None  # of a collective whose peer is gone
        self.error_at = 0.0
        self.end: str | None = None
        self.left = False

    def heartbeat(self) -> Heartbeat:
        step, phase = self.beat
        place = place_of_error(self.error) if self.error else place_of_process(self.thread)
        return Heartbeat(
            started=self.started,
            time=time.time(),
            host=socket.gethostname(),
            pid=os.getpid(),
            step=step,
            phase=phase,
            **place._asdict(),
            raised=describe(self.error) if self.error else None,
            end=self.end,
            left=self.left,
        )
