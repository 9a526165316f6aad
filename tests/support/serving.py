"""A server of a small pipeline, and images as its clients send and receive them."""

import base64
import io
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import uvicorn
from fastapi import FastAPI
from PIL import Image

from megafusion.serve.server import listen


@contextmanager
def running(app: FastAPI) -> Iterator[str]:
    """The address of an application that answers in a thread."""
    listener = listen("127.0.0.1", 0)
    server = uvicorn.Server(
        uvicorn.Config(app, log_level="warning", http="h11", ws="none", timeout_graceful_shutdown=1)
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def data_url(image: Image.Image) -> str:
    return f"data:image/png;base64,{base64.b64encode(png(image)).decode()}"


def decoded(encoded: str) -> np.ndarray:
    """The pixels of base64, or of a data URL."""
    content = base64.b64decode(encoded.removeprefix("data:image/png;base64,"))
    return np.asarray(Image.open(io.BytesIO(content)), int)


def sample_image(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 30, 3), np.uint8))
