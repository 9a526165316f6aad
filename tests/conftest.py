"""Shared fixtures: a tokenizer, a small autoencoder, shards made from a few real pairs, a small run."""

import os
import signal
from pathlib import Path

# One thread a test process: the suite runs on two cores beside whatever else does.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A shell that starts the suite in the background has it ignore Ctrl-C, which tests raise.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import torch
import torch.distributed as dist
from hypothesis import settings

# Without a GPU the kernels run under Triton's interpreter, which must be chosen before diffusers imports it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from megafusion.config import parse_config
from megafusion.images.codec import ImageCodec
from megafusion.processes import STOP_SIGNALS
from megafusion.sequence.tokenizer import Tokenizer
from megafusion.train.config import RunConfig
from tests.support.quantized import make_vq, quantized_run
from tests.support.sizes import make_mixed_shards, mixed_run
from tests.support.small import TOKENIZER, make_shards, make_vae, small_run

# A busy machine makes no test fail: how long things take is for the benchmarks.
settings.register_profile("ours", deadline=None)
settings.load_profile("ours")


@pytest.fixture(scope="module", autouse=True)
def signal_handlers():
    """As before, after each file: a command that a test runs in its process leaves its own."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    wakeup = signal.set_wakeup_fd(-1)
    yield
    signal.set_wakeup_fd(wakeup)
    for number, handler in before.items():
        signal.signal(number, handler)


LONG = ("faults", "parallel", "train")
"""Rooms whose files take long, because several ranks run: they are started first."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rooms = {item: item.path.relative_to(Path(__file__).parent).parts[0] for item in items}
    items.sort(key=lambda item: LONG.index(rooms[item]) if rooms[item] in LONG else len(LONG))


@pytest.fixture(autouse=True)
def no_process_group_is_left():
    """Each group has threads that wake a hundred times a second until it is destroyed."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_pretrained(TOKENIZER)


@pytest.fixture(scope="session")
def vae_folder(tmp_path_factory) -> Path:
    """A random autoencoder with 4 x 8 x 8 latents for images of 32 pixels."""
    return make_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="session")
def codec(vae_folder) -> ImageCodec:
    return ImageCodec.from_pretrained(vae_folder)


@pytest.fixture(scope="session")
def shards(tmp_path_factory, vae_folder) -> Path:
    """pairs/ with 22 pairs in 3 shards and text/ with 40 glosses in 5."""
    return make_shards(tmp_path_factory.mktemp("shards"), vae_folder)


@pytest.fixture(scope="session")
def vq_folder(tmp_path_factory) -> Path:
    """A random VQModel with 4 x 4 codes for images of 32 pixels."""
    return make_vq(tmp_path_factory.mktemp("vq"))


@pytest.fixture(scope="session")
def quantized_shards(tmp_path_factory, vq_folder) -> Path:
    """The documents of `shards`, with images as codes."""
    return make_shards(tmp_path_factory.mktemp("codes"), vq_folder)


@pytest.fixture
def quantized_values(quantized_shards, vq_folder, tmp_path) -> dict:
    """Plain values of a small run on images as codes."""
    return quantized_run(quantized_shards, vq_folder, tmp_path / "run")


@pytest.fixture(scope="session")
def mixed_shards(tmp_path_factory, vae_folder) -> Path:
    """pairs/ with 24 pairs of three sizes in 3 shards, and text/ with 40 texts in 5."""
    return make_mixed_shards(tmp_path_factory.mktemp("mixed"), vae_folder)


@pytest.fixture
def mixed_values(mixed_shards, vae_folder, tmp_path) -> dict:
    """Plain values of a small run of images of three sizes."""
    return mixed_run(mixed_shards, vae_folder, tmp_path / "run")


@pytest.fixture
def run_values(shards, vae_folder, tmp_path) -> dict:
    """Plain values of a run that takes a fraction of a second a step, to be changed at will."""
    return small_run(shards, vae_folder, tmp_path / "run")


@pytest.fixture
def run_config(run_values) -> RunConfig:
    return parse_config(RunConfig, run_values, "test")
