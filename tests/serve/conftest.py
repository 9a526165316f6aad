"""A server of a small pipeline, in this process."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import uvicorn
from fastapi import FastAPI
from openai import OpenAI

from megafusion.config import parse_config
from megafusion.generate.pipeline import TransfusionPipeline
from megafusion.serve.app import make_app
from megafusion.serve.config import ServeConfig
from megafusion.serve.server import listen
from megafusion.train.config import RunConfig
from tests.support.generation import make_pipeline
from tests.support.small import small_run


@pytest.fixture(scope="session")
def pipeline(tokenizer, codec, vae_folder) -> TransfusionPipeline:
    """A random model of images of 32 x 32 pixels, in rows of 96 positions."""
    values = small_run(Path("unused"), vae_folder, Path("unused"))
    made = make_pipeline(parse_config(RunConfig, values, "test"), tokenizer, codec, num_steps=4)
    config = made.config.model_copy(update={"sequence_length": 96})
    return TransfusionPipeline(made.model, tokenizer, codec, config)


@contextmanager
def running(app: FastAPI) -> Iterator[str]:
    """The address of an application that answers."""
    listener = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", http="h11", ws="none"))
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


@pytest.fixture(scope="module")
def address(pipeline) -> Iterator[str]:
    with running(make_app(pipeline, ServeConfig(), "small", [])) as address:
        yield address


@pytest.fixture(scope="module")
def client(address) -> OpenAI:
    return OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=60)
