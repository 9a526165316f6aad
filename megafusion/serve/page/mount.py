"""The page on a server's application."""

import hmac
import os
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gradio as gr
from fastapi import FastAPI
from starlette.datastructures import MutableHeaders

from megafusion.serve.page.layout import make_page
from megafusion.serve.page.look import CSS, theme

POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; media-src 'self' data: blob:; "
    "worker-src 'self' blob:; connect-src 'self' data: blob:; frame-ancestors 'self'"
)
"""Content-Security-Policy: a browser fetches nothing from another machine for the page."""
MAX_CAPTIONS = 8


def mount_page(app: FastAPI, name: str, captions: Sequence[str], keys: Sequence[str]) -> FastAPI:
    """Mount the page under / of an application of `make_app`, whose other routes come first.

    name: of the model. captions: examples of what it knows. keys: one of which is the password, if any.
    Files live until `remove_files`.
    """
    worker = app.state.worker
    app.state.page_files = files = TemporaryDirectory(prefix="megafusion-page-")
    drawn, cache = Path(files.name, "drawn"), Path(files.name, "cache")
    drawn.mkdir()
    os.environ["GRADIO_TEMP_DIR"] = str(cache)  # read by each component
    blocks = make_page(worker, name, captions, drawn)
    # Only then does gradio refuse files that were not uploaded; mounting leaves it out.
    blocks.has_launched = True
    app.add_middleware(_Policy)
    return gr.mount_gradio_app(
        app,
        blocks,
        path="/",
        theme=theme(),
        css=CSS,
        auth=(lambda _, password: is_key(password, keys)) if keys else None,
        auth_message="Any name; the password is one of the server's keys.",
        footer_links=[],
        ssr_mode=False,
        show_error=False,
        max_file_size=worker.config.max_body_bytes,
        enable_monitoring=False,
    )


def remove_files(app: FastAPI) -> None:
    """Remove what was uploaded and drawn."""
    app.state.page_files.cleanup()


def read_captions(pipeline: Path) -> list[str]:
    """Some captions that a run's model drew right, from the captions.txt of the quickstart's report."""
    for folder in (pipeline, pipeline.parent):
        if (path := folder / "captions.txt").is_file():
            lines = path.read_text("utf-8", "replace").splitlines()
            right = [line[2:].split(" -> ")[0] for line in lines if line.startswith("= ")]
            return right[:: len(right) // MAX_CAPTIONS | 1][:MAX_CAPTIONS]  # an odd step: styles alternate
    return []


def is_key(given: str, keys: Sequence[str]) -> bool:
    """Whether a text is one of the keys; each is compared, so that the time tells nothing."""
    return sum(hmac.compare_digest(given.encode(), key.encode()) for key in keys) > 0


class _Policy:
    """ASGI middleware that adds POLICY to each response."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["Content-Security-Policy"] = POLICY
            await send(message)

        await self.app(scope, receive, send_with_policy if scope["type"] == "http" else send)
