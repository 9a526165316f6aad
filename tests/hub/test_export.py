"""A text model comes out as it went in; one of our own comes out as transformers loads it."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from typer.testing import CliRunner

from megafusion.cli import app
from megafusion.config import load_config, parse_config
from megafusion.errors import UserError
from megafusion.generate.folder import PipelineConfig
from megafusion.generate.pipeline import TransfusionPipeline
from megafusion.hub.config import read_hub_config
from megafusion.hub.export import export_text_model
from megafusion.model.config import ModelConfig
from megafusion.model.transfusion import Transfusion
from megafusion.objective.config import ObjectiveConfig, SamplingConfig
from megafusion.sequence.document import Segment
from megafusion.sequence.tokenizer import Tokenizer
from megafusion.train.config import RunConfig
from megafusion.train.loop import train
from tests.support.generation import full_hidden, prompt_batch
from tests.support.hub import FAMILIES, IMAGES, PIECES, load_here, make_folder, pipeline_from
from tests.support.runs import start
from tests.support.small import small_run
from tests.support.tokenizers import make_qwen

# None begins with a space, before which transformers puts no other, as SentencePiece does.
TEXTS = ["red apple, 3d style", "two  spaces ", "Ein Läufer, 走る 🏃", "", "a" * 40]


def run(*arguments: str) -> str:
    """The output of a command, or the error that it ends with."""
    result = CliRunner().invoke(app, list(arguments))
    if isinstance(result.exception, UserError):
        return str(result.exception)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("family", FAMILIES)
def test_import_then_export_is_the_same_model(tmp_path, tokenizer, codec, family):
    folder, out = tmp_path / "hub", tmp_path / "out"
    theirs = make_folder(folder, family, dtype=torch.bfloat16)
    base = read_hub_config(folder)
    export_text_model(pipeline_from(folder, tokenizer, codec), out, base, "card", "bfloat16")
    before, after = (load_file(f / "model.safetensors") for f in (folder, out))
    assert before.keys() == after.keys()
    for name, weight in before.items():
        assert weight.dtype == after[name].dtype
        assert torch.equal(weight.view(torch.int16), after[name].view(torch.int16)), name
    assert read_hub_config(out) == base
    loaded, again = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in (out, folder))
    assert type(loaded) is type(theirs)
    tokens = torch.arange(3, 40)[None]
    assert torch.equal(loaded(tokens).logits, again(tokens).logits)


def test_a_padded_vocabulary_and_its_tokenizer_come_out_as_they_went_in(tmp_path, codec, vae_folder):
    """As Qwen's: new ids take the padding's rows, which are exported too; ids are transformers' own."""
    folder, out = make_qwen(tmp_path / "hub"), tmp_path / "out"
    num_ids = Tokenizer.from_pretrained(folder).num_text_ids
    make_folder(folder, "qwen2.5", dtype=torch.bfloat16, vocab_size=num_ids + 40)
    arguments = ("--image-size", "32x32", "--image-size", "16x16", "--vae", str(vae_folder))
    run("import", str(folder), "--out", str(tmp_path / "new.yaml"), *arguments)
    written = yaml.safe_load((tmp_path / "new.yaml").read_text())
    assert written["model"]["vocab_size"] == num_ids + 40
    tokenizer = Tokenizer.from_pretrained(written["data"]["tokenizer"])
    assert (tokenizer.boi, tokenizer.boi_of_size(1)) == (num_ids, num_ids + 2)
    model = load_here(folder)
    pipeline_config = PipelineConfig(
        model=model.config, objective=ObjectiveConfig(), sampling=SamplingConfig()
    )
    pipeline = TransfusionPipeline(model, tokenizer, codec, pipeline_config)
    export_text_model(pipeline, out, read_hub_config(folder), "card", "bfloat16")
    before, after = (load_file(f / "model.safetensors") for f in (folder, out))
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())
    ids = AutoTokenizer.from_pretrained(out)
    for sentence in TEXTS:
        assert ids(sentence)["input_ids"] == tokenizer.encode(sentence)


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        {
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
)
def test_keys_of_older_transformers_are_read_and_kept(tmp_path, tokenizer, codec, scaling):
    folder, out = tmp_path / "hub", tmp_path / "out"
    make_folder(folder, "llama2")
    values = json.loads((folder / "config.json").read_text())
    values.pop("rope_parameters")
    values |= {"rope_theta": 20_000.0, "rope_scaling": scaling, "torch_dtype": values.pop("dtype")}
    (folder / "config.json").write_text(json.dumps(values))
    pipeline = pipeline_from(folder, tokenizer, codec)
    assert (pipeline.config.model.rope_theta, bool(pipeline.config.model.rope_scaling)) == (
        2e4,
        bool(scaling),
    )
    export_text_model(pipeline, out, values, "card", "float32")
    assert read_hub_config(out) == values
    assert AutoConfig.from_pretrained(out).rope_parameters["rope_theta"] == 20_000.0


@pytest.fixture(scope="module")
def run_folder(shards, vae_folder, tmp_path_factory) -> Path:
    """A finished run of a model that began at random, with a second image size."""
    values = small_run(shards, vae_folder, tmp_path_factory.mktemp("export") / "run")
    values["model"] |= {"image_sizes": [[32, 32], [16, 16]], "vocab_size": 2049}
    return start(values)


def assert_tables_are_whole(text: str) -> None:
    """Of two columns, each row on a line of its own."""
    row = re.compile(r"\|[^|]*\|([^|]|\\\|)*\|")
    for block in re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL).strip().split("\n\n"):
        if "|" in block:
            assert all(map(row.fullmatch, block.split("\n"))), block


@torch.no_grad()
def test_a_model_of_our_own_is_exported_with_tokenizer_and_card(run_folder, tmp_path, tokenizer):
    out = tmp_path / "exported"
    printed = run("export", str(run_folder), str(out), "--to", "hf", "--license", "apache-2.0")
    assert "AutoModelForCausalLM.from_pretrained" in printed
    theirs, ids = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert (type(theirs).__name__, theirs.config.vocab_size) == ("LlamaForCausalLM", PIECES)
    assert theirs.config.max_position_embeddings == 96
    for sentence in TEXTS:
        encoded = ids(sentence)["input_ids"]
        assert encoded == [tokenizer.bos, *tokenizer.encode(sentence)]
        assert ids.decode(encoded, skip_special_tokens=True) == tokenizer.decode(encoded)
    generation = GenerationConfig.from_pretrained(out)
    assert (generation.bos_token_id, generation.eos_token_id) == (tokenizer.bos, tokenizer.eos)
    ours = TransfusionPipeline.from_pretrained(run_folder / "pipeline")
    batch, _ = prompt_batch(ours, [[Segment("tokens", np.array(tokenizer.encode(TEXTS[0])))]])
    hidden, _ = full_hidden(ours.model, batch)
    torch.testing.assert_close(
        theirs(batch.tokens).logits, ours.model.tail.head(hidden)[..., :PIECES], rtol=0, atol=1e-5
    )
    card = ModelCard.load(out / "README.md")
    assert (card.data.license, card.data.library_name) == ("apache-2.0", "transformers")
    for fact in (
        "| began as | random weights |",
        "| steps | 6 of 6 |",
        "4 rows of 96",
        "22 documents",
        "text_loss",
    ):
        assert fact in card.text, fact
    assert f"# Text path of {run_folder.name}\n" in card.text
    assert_tables_are_whole(card.text)
    assert re.search(r"^\| text_loss \| \d\.\d{1,3} \|$", card.text, re.MULTILINE)
    assert "config:\n\n```\n" in card.text  # of the shards' preprocessing, as a block of its own
    # Again to the same place, and nowhere that holds anything else.
    again = ["--to", "hf", "--overwrite"]
    run("export", str(run_folder), str(out), *again, "--dtype", "bfloat16")
    assert load_file(out / "model.safetensors")["lm_head.weight"].dtype == torch.bfloat16
    assert "holds other files" in run("export", str(run_folder), str(run_folder / "pipeline"), *again)


def test_a_pipeline_away_from_its_run_has_a_shorter_card(run_folder, tmp_path):
    moved = tmp_path / "a/b/c/pipeline"
    TransfusionPipeline.from_pretrained(run_folder / "pipeline").save_pretrained(moved)
    run("export", str(moved), str(tmp_path / "out"), "--to", "hf")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["max_position_embeddings"], config["torch_dtype"]) == (96, "float32")
    card = (tmp_path / "out/README.md").read_text()
    assert "Licence: not stated" in card
    assert "## Training" not in card
    older = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps({k: v for k, v in older.items() if k != "sequence_length"}))
    said = run("export", str(moved), str(tmp_path / "older"), "--to", "hf")
    assert "a pipeline of version 0.1, without its number of positions; export its run" in said
    assert not (tmp_path / "older").exists()


def test_a_tokenizer_that_transformers_would_not_read_is_refused(run_values, tmp_path):
    """AutoTokenizer takes Qwen's own for these architectures, whatever the folder says."""
    run_values["model"]["attention_bias"] = True
    run_values["train"]["num_steps"] = 1
    start(run_values)
    said = run("export", run_values["out"], str(tmp_path / "out"), "--to", "hf")
    assert "is a Qwen model to transformers, which reads no SentencePiece tokenizer for those" in said
    assert not (tmp_path / "out").exists()


def test_a_model_that_no_architecture_fits_is_refused(run_values, tokenizer, codec, tmp_path):
    keys = run_values["model"] | {"attention_bias": True, "qk_norm": True}
    config = parse_config(ModelConfig, keys, "test")
    pipeline_config = PipelineConfig(model=config, objective=ObjectiveConfig(), sampling=SamplingConfig())
    pipeline = TransfusionPipeline(Transfusion(config, ObjectiveConfig()), tokenizer, codec, pipeline_config)
    with pytest.raises(
        UserError, match=r"no architecture of transformers has both model\.attention_bias and"
    ):
        export_text_model(pipeline, tmp_path / "out", {}, "", "float32")
    assert not list(tmp_path.iterdir())


def test_an_imported_configuration_trains_and_is_exported(run_values, tmp_path, vae_folder):
    """From a folder to a run to a folder: what the run does not decide is as it was."""
    folder, config = tmp_path / "hub", tmp_path / "imported.yaml"
    make_folder(folder, "smollm2", dtype=torch.bfloat16)
    (folder / "README.md").write_text("---\nlicense: llama3\n---\n# A model\n")
    arguments = (
        "import",
        str(folder),
        "--out",
        str(config),
        "--image-size",
        "32x32",
        "--vae",
        str(vae_folder),
    )
    assert "add out, data.sources" in run(*arguments)
    assert "exists already; name another --out" in run(*arguments)
    written = yaml.safe_load(config.read_text())
    assert written["model"] == IMAGES | written["model"]
    assert written["objective"]["noise_process"]["kind"] == "flow"
    assert written["sampling"]["sampler"] == "euler"
    own = {key: written[key] for key in ("model", "objective", "sampling")}
    rest = {**run_values, **own, "train": run_values["train"] | written["train"]}
    rest["data"] = run_values["data"] | written["data"]
    config.write_text(yaml.safe_dump(rest))
    train(load_config(RunConfig, config, ["train.num_steps=1"]))
    run("export", run_values["out"], str(tmp_path / "out"), "--to", "hf")
    before, after = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "out"))
    assert before == after
    card = (tmp_path / "out/README.md").read_text()
    assert f"| began as | {folder} (licence llama3) |" in card


def test_a_folder_that_is_not_supported_is_not_imported(tmp_path, vae_folder):
    make_folder(tmp_path / "hub", "mistral")
    values = json.loads((tmp_path / "hub/config.json").read_text())
    arguments = ("--out", str(tmp_path / "new.yaml"), "--image-size", "32x32", "--vae", str(vae_folder))
    (tmp_path / "hub/config.json").write_text(json.dumps(values | {"sliding_window": 64}))
    assert "(at most 64, the model's sliding_window)" in run("import", str(tmp_path / "hub"), *arguments)
    (tmp_path / "new.yaml").unlink()
    (tmp_path / "hub/config.json").write_text(json.dumps(values | {"architectures": ["BertModel"]}))
    assert "architecture BertModel is not supported" in run("import", str(tmp_path / "hub"), *arguments)
    assert "--image-size 32: is not HEIGHTxWIDTH" in run(
        "import", str(tmp_path / "hub"), *arguments[:3], "32"
    )
    assert not (tmp_path / "new.yaml").exists()
