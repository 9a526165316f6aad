"""A server of a small pipeline, in this process, and the client of OpenAI."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import OpenAI

from megafusion.config import parse_config
from megafusion.generate.pipeline import TransfusionPipeline
from megafusion.serve.app import make_app
from megafusion.serve.config import ServeConfig
from megafusion.train.config import RunConfig
from tests.support.generation import make_pipeline
from tests.support.serving import running
from tests.support.small import small_run


@pytest.fixture(scope="module")
def pipeline(tokenizer, codec, vae_folder) -> TransfusionPipeline:
    """A random model of images of 32 x 32 pixels, in rows of 96 positions."""
    values = small_run(Path("unused"), vae_folder, Path("unused"))
    made = make_pipeline(parse_config(RunConfig, values, "test"), tokenizer, codec, num_steps=4)
    config = made.config.model_copy(update={"sequence_length": 96})
    return TransfusionPipeline(made.model, tokenizer, codec, config)


@pytest.fixture(scope="module")
def app(pipeline):
    return make_app(pipeline, ServeConfig(), "small", [])


@pytest.fixture(scope="module")
def address(app) -> Iterator[str]:
    with running(app) as address:
        yield address


@pytest.fixture(scope="module")
def client(address) -> OpenAI:
    return OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=60)
