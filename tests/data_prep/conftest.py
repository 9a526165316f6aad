"""Preprocessing with a small autoencoder, into a folder of the test's own."""

import pytest

from data_prep.config import PreprocessConfig
from data_prep.preprocess import preprocess


@pytest.fixture
def settings(tmp_path, tokenizer, vae_folder) -> dict:
    """Values of a PreprocessConfig that needs inputs alone."""
    return {
        "out": tmp_path / "out",
        "tokenizer": tokenizer.path,
        "vae": vae_folder,
        "image_sizes": ((32, 32),),
    }


@pytest.fixture
def make(settings):
    """Preprocess with some values changed; `part` is a ShardRange."""

    def run(part=None, **changes):
        return preprocess(PreprocessConfig(**settings | changes), part)

    return run
