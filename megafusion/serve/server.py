"""A server's process: its socket, its keys, and how it ends."""

import asyncio
import os
import socket
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from megafusion.errors import ExitStatus, UserError
from megafusion.serve.config import LOCAL_HOSTS

API_KEYS = "MEGAFUSION_API_KEYS"
LAST_SECONDS = 5
"""How long connections without a request, such as a page's, hold up the end."""


def read_keys(host: str) -> list[str]:
    """The keys of which a request must bear one: those of MEGAFUSION_API_KEYS, comma-separated.

    Raises UserError for a host that other machines reach, and no key.
    """
    keys = [key.strip() for key in os.environ.get(API_KEYS, "").split(",") if key.strip()]
    if host not in LOCAL_HOSTS:
        if not keys:
            raise UserError(
                f"--host {host} lets other machines in: set {API_KEYS} to the keys that they must give "
                f"(comma-separated), or leave --host at {LOCAL_HOSTS[1]}"
            )
        print(f"warning: --host {host}: other machines reach this server, without TLS", file=sys.stderr)
    return keys


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 is any free one. Raises UserError for a host or port that cannot be."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1024)
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: {error.strerror}; choose another one") from error
    return listener


def model_name(pipeline: Path) -> str:
    """The name of a model: its folder's, or its run's."""
    folder = pipeline.resolve()
    return folder.parent.name if folder.name == "pipeline" else folder.name


def serve(app: FastAPI, listener: socket.socket) -> None:
    """Answer until SIGTERM or SIGINT, and then what was accepted; a second one ends at once.

    Raises UserError where the model's thread failed for good: what was accepted is then answered with 500.
    """
    options: dict[str, Any] = {"http": "h11", "ws": "none", "loop": "asyncio", "server_header": False}
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=LAST_SECONDS, **options)
    asyncio.run(_Server(config, app).serve(sockets=[listener]))
    if failure := app.state.worker.failure:
        first_line = str(failure).partition("\n")[0]
        raise UserError(
            "the server has ended, because its model cannot go on: "
            f"{type(failure).__name__}: {first_line}; the log above has where. Start it again",
            exit_status=ExitStatus.FAILED,
        )


class _Server(uvicorn.Server):
    """uvicorn's server, which listens until the accepted requests are answered, and refuses further ones."""

    def __init__(self, config: uvicorn.Config, app: FastAPI):
        super().__init__(config)
        self.worker = app.state.worker
        self._is_asked_to_end = False  # a worker also closes by itself, when its device is lost

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._is_asked_to_end:
            self.should_exit = self.force_exit = True
        else:  # a handler must not wait for the worker's lock, which the code that it interrupts may hold
            self._is_asked_to_end = True
            asyncio.get_event_loop().call_soon_threadsafe(self.worker.close)

    async def on_tick(self, counter: int) -> bool:
        is_answered = self.worker.is_closing and not self.worker.num_slots
        return await super().on_tick(counter) or is_answered
