"""Fixtures: preprocessing with a small autoencoder, into the test's folder."""

import pytest

from data_prep.config import PreprocessConfig
from data_prep.preprocess import preprocess


@pytest.fixture
def settings(tmp_path, tokenizer, vae_folder) -> dict:
    """Values of a PreprocessConfig; only inputs are missing."""
    return {
        "out": tmp_path / "out",
        "tokenizer": tokenizer.path,
        "vae": vae_folder,
        "image_sizes": ((32, 32),),
    }


@pytest.fixture
def make(settings):
    """Preprocess with some values changed."""

    def run(shard_range=None, **changes):
        return preprocess(PreprocessConfig(**settings | changes), shard_range)

    return run
