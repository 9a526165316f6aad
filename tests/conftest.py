"""What most tests need: a tokenizer, a small autoencoder, shards made from a few real pairs, a small run."""

import os
from pathlib import Path

# One thread a test process: the suite runs on two cores beside whatever else does.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

# Without a GPU the kernels run under Triton's interpreter, which must be chosen before diffusers imports it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from diffusers import AutoencoderKL

from data_prep.preprocess import PreprocessConfig, preprocess
from megafusion.autoencoder.codec import ImageCodec
from megafusion.config import parse_config
from megafusion.sequence.tokenizer import Tokenizer
from megafusion.train.config import RunConfig

ROOT = Path(__file__).parents[1]
PACK = ROOT / "data_prep/emoji/emoji-000000.tar"
TOKENIZER = ROOT / "data_prep/tokenizer/tokenizer.model"
GLOSSES = ROOT / "data_prep/text/glosses.txt"


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer(TOKENIZER)


@pytest.fixture(scope="session")
def vae_folder(tmp_path_factory) -> Path:
    """A random autoencoder with 4 x 8 x 8 latents for pictures of 32 pixels."""
    torch.manual_seed(0)
    model = AutoencoderKL(
        in_channels=48,
        out_channels=48,
        latent_channels=4,
        block_out_channels=(8,),
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        norm_num_groups=4,
        layers_per_block=1,
        scaling_factor=2.0,
        shift_factor=0.1,
        mid_block_add_attention=False,
    )
    folder = tmp_path_factory.mktemp("vae")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def codec(vae_folder) -> ImageCodec:
    return ImageCodec.from_pretrained(vae_folder)


@pytest.fixture(scope="session")
def shards(tmp_path_factory, vae_folder) -> Path:
    """pairs/ with 22 pairs in 3 shards and text/ with 40 glosses in 5."""
    folder = tmp_path_factory.mktemp("shards")
    keys = folder / "keys.txt"
    starter = (ROOT / "data_prep/emoji/starter.txt").read_text().split()
    keys.write_text("\n".join(starter[:22]))
    texts = folder / "texts.txt"
    texts.write_text("".join(GLOSSES.read_text().splitlines(keepends=True)[:40]))
    preprocess(
        PreprocessConfig(
            out=folder,
            tokenizer=TOKENIZER,
            vae=vae_folder,
            pictures=(PACK,),
            keys=keys,
            image_size=32,
            texts=(texts,),
            documents_per_shard=8,
        )
    )
    return folder


@pytest.fixture
def run_values(shards, vae_folder, tmp_path) -> dict:
    """Plain values of a run that takes a fraction of a second a step, to be changed at will."""
    return {
        "out": str(tmp_path / "run"),
        "data": {
            "sources": {
                "pairs": {"path": str(shards / "pairs"), "weight": 0.5},
                "text": {"path": str(shards / "text"), "weight": 0.5},
            },
            "tokenizer": str(TOKENIZER),
            "vae": str(vae_folder),
            "sequence_length": 96,
            "images_per_row": 4,
            "num_streams": 4,
            "look_ahead": 6,
        },
        "model": {
            "num_layers": 2,
            "width": 32,
            "num_heads": 4,
            "num_kv_heads": 2,
            "hidden_width": 64,
            "vocab_size": 2048,
            "latent_shape": [4, 8, 8],
            "patch_size": 2,
        },
        "optimizer": {"learning_rate": 3e-3, "num_warmup_steps": 2},
        "train": {
            "num_steps": 6,
            "global_batch_rows": 4,
            "micro_batch_rows": 2,
            "log_every": 1,
            "checkpoint_every": 3,
        },
        "sampling": {"num_steps": 4, "max_new_tokens": 6},
    }


@pytest.fixture
def run_config(run_values) -> RunConfig:
    return parse_config(RunConfig, run_values, "test")
