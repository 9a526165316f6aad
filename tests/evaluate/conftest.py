"""Eight captioned emoji with groups and keys, and a random model that draws images of 32 pixels."""

import json
from pathlib import Path

import pytest

from data_prep.readers.webdataset import tar_pairs
from megafusion.config import parse_config
from megafusion.evaluate.config import EvaluateConfig
from megafusion.generate.pipeline import TransfusionPipeline
from tests.support.generation import make_pipeline
from tests.support.small import PACK, ROOT

KEYS = (ROOT / "data_prep/emoji/starter.txt").read_text().split()[:8]


@pytest.fixture(scope="session")
def annotations(tmp_path_factory) -> Path:
    """COCO's file of the first eight pairs of the starter split: six seen, two held out."""
    folder = tmp_path_factory.mktemp("coco")
    pairs = {pair.key: pair for pair in tar_pairs(PACK)}
    images, captions = [], []
    for number, key in enumerate(KEYS, 1):
        (folder / f"{key}.webp").write_bytes(pairs[key].image)
        group = "seen" if number <= 6 else "held-out"
        images.append({"id": number, "file_name": f"{key}.webp", "key": key, "group": group})
        text = pairs[key].caption.decode()
        captions.append({"id": number, "image_id": number, "caption": text})
    path = folder / "captions.json"
    path.write_text(json.dumps({"images": images, "annotations": captions}))
    return path


@pytest.fixture
def texts(tmp_path) -> Path:
    """Five glosses."""
    path = tmp_path / "held-out.txt"
    path.write_text("".join((ROOT / "data_prep/text/glosses.txt").open().readlines()[:5]))
    return path


@pytest.fixture
def config(annotations, texts) -> EvaluateConfig:
    values = {
        "texts": [str(texts)],
        "annotations": str(annotations),
        "judge": str(ROOT / "data_prep/emoji/classifier.safetensors"),
        "batch_size": 3,
    }
    return parse_config(EvaluateConfig, values, "test")


@pytest.fixture
def pipeline(run_config, tokenizer, codec) -> TransfusionPipeline:
    return make_pipeline(run_config, tokenizer, codec, num_steps=2)


@pytest.fixture
def saved(pipeline, tmp_path) -> Path:
    pipeline.save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"
