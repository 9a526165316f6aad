"""Preprocess, train and generate with tokenizer.json files like Qwen's, GPT-2's and Llama 3's."""

import pytest
import tokenizers

from data_prep.config import PreprocessConfig
from data_prep.preprocess import preprocess
from megafusion import TransfusionPipeline
from megafusion.checkpoint.folder import latest_checkpoint
from megafusion.config import parse_config
from megafusion.data.reader import ShardFolder
from megafusion.errors import UserError
from megafusion.train.config import RunConfig
from megafusion.train.loop import train
from megafusion.train.open_model import open_checkpoint
from tests.support.small import GLOSSES, PACK, TOKENIZER, small_run
from tests.support.tokenizers import make_gpt2, make_llama3, make_qwen


@pytest.fixture
def make(tmp_path, vae_folder):
    """Preprocess 12 pairs and 12 texts, and return values of a run of two steps on them."""

    def run(tokenizer, vocab_size: int) -> dict:
        starter = PACK.with_name("starter.txt").read_text().split()
        (tmp_path / "keys.txt").write_text("\n".join(starter[:12]))
        (tmp_path / "texts.txt").write_text("\n".join(GLOSSES.read_text().splitlines()[:12]))
        out = tmp_path / tokenizer.name
        inputs = {"images": (PACK,), "keys": tmp_path / "keys.txt", "texts": (tmp_path / "texts.txt",)}
        sizes = {"image_sizes": ((32, 32),), "documents_per_shard": 4}
        preprocess(PreprocessConfig(out=out, tokenizer=tokenizer, vae=vae_folder, **inputs, **sizes))
        values = small_run(out, vae_folder, tmp_path / f"run-{tokenizer.name}")
        values["data"] |= {"tokenizer": str(tokenizer), "sequence_length": 160}
        values["model"]["vocab_size"] = vocab_size
        values["train"]["num_steps"] = 2
        values["checkpoint"]["every"] = 2
        values["samples"] = {"every": 2, "num_pairs": 1}
        return values

    return run


@pytest.mark.parametrize(
    ("maker", "vocab_size", "file"),
    [
        (make_qwen, 640, ""),  # 605 ids, boi and eoi, and padding
        (make_gpt2, 603, "tokenizer.json"),
        pytest.param(make_llama3, 606, "", marks=pytest.mark.full),  # boi and eoi are reserved ids
    ],
)
def test_preprocess_train_generate(make, tmp_path, maker, vocab_size, file):
    path = maker(tmp_path / "tokenizer") / file
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer/tokenizer.json"))
    library.no_truncation()
    library.no_padding()
    values = make(path, vocab_size)
    for kind in ("pairs", "text"):
        folder = ShardFolder(tmp_path / path.name / kind)
        assert folder.manifest.num_documents == 12
        lines = (tmp_path / "texts.txt").read_text().splitlines()
        for number in range(12):
            document = folder.read(number)
            text = document.metadata["caption"] if kind == "pairs" else lines[document.metadata["line"] - 1]
            tokens = next(s.data for s in document.segments if s.kind == "tokens")
            assert tokens.tolist() == library.encode(text, add_special_tokens=False).ids
    config = parse_config(RunConfig, values, "test")
    train(config)
    saved = {p.name for p in (config.out / "pipeline").iterdir()}
    assert saved == {"config.json", "model.safetensors", "vae", "tokenizer.json", "tokenizer_config.json"}
    pipeline = TransfusionPipeline.from_pretrained(config.out)
    (image,) = pipeline.draw(["a red apple"])
    assert image.size == (32, 32)
    # The run's own checkpoint reads data.tokenizer, its pipeline the copy.
    again = open_checkpoint(latest_checkpoint(config.out), "ema")
    assert again.tokenizer.path == tmp_path / "tokenizer/tokenizer.json"
    assert again.describe([image]) == pipeline.describe([image])
    if maker is make_qwen:
        (tmp_path / "tokenizer/tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
        with pytest.raises(UserError, match=r"data\.tokenizer: other files than .* was started with"):
            train(config)
    values["data"]["tokenizer"] = str(TOKENIZER)
    values["model"]["vocab_size"] = 2048
    with pytest.raises(
        UserError, match=r"pairs was made with a tokenizer of hash .* but data\.tokenizer has"
    ):
        train(parse_config(RunConfig, values | {"out": str(tmp_path / "other")}, "test"))
