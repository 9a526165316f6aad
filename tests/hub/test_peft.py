"""PEFT reads our LoRA adapters, and we read PEFT's: the logits are equal."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megafusion.config import parse_config
from megafusion.errors import UserError
from megafusion.generate.pipeline import TransfusionPipeline
from megafusion.train.config import RunConfig
from megafusion.train.loop import train
from tests.hub.test_init_from import from_hub
from tests.support.generation import full_hidden
from tests.support.hub import PIECES, make_folder
from tests.support.marks import full
from tests.support.small import small_run
from tests.support.texts import documents, pack, text_logits

peft = pytest.importorskip("peft", reason="peft is a package of requirements.txt: make .venv again")
TOLERANCE = {"rtol": 0, "atol": 1e-5}


def row_logits(model: torch.nn.Module) -> torch.Tensor:
    """Logits of transformers' model for a row that is one document."""
    return model(input_ids=pack([documents([29], 0)]).tokens).logits


def our_logits(pipeline: TransfusionPipeline) -> torch.Tensor:
    hidden, _ = full_hidden(pipeline.model, pack([documents([29], 0)]))
    return pipeline.model.tail.head(hidden)[..., :PIECES]


@pytest.fixture(scope="module", params=["llama3", *full("qwen2.5")])
def runs(request, shards, vae_folder, tmp_path_factory) -> tuple[Path, Path, Path]:
    """A text model's folder, a run that is the same model, and a LoRA run from the folder."""
    folder = tmp_path_factory.mktemp("peft")
    make_folder(folder / "hub", request.param)
    plain = from_hub(small_run(shards, vae_folder, folder / "plain"), folder / "hub")
    plain["train"] |= {"num_steps": 1, "freeze": ["stem.*", "blocks.*", "tail.[nh]*"]}
    train(parse_config(RunConfig, plain, "test"))
    values = from_hub(small_run(shards, vae_folder, folder / "lora"), folder / "hub")
    values["train"] |= {"lora": {"rank": 3, "alpha": 6.0}, "ema_decay": 0.0}
    values["optimizer"] |= {"learning_rate": 3e-2}
    train(parse_config(RunConfig, values, "test"))
    return folder / "hub", folder / "plain", folder / "lora"


@torch.no_grad()
def test_peft_reads_ours(runs):
    hub, _, run = runs
    model = AutoModelForCausalLM.from_pretrained(hub, attn_implementation="eager")
    before = row_logits(model)
    model = peft.PeftModel.from_pretrained(model, run / "lora").eval()
    found, expected = row_logits(model), our_logits(TransfusionPipeline.from_pretrained(run))
    torch.testing.assert_close(found, expected, **TOLERANCE)
    assert (found - before).abs().max() > 0.1
    keys = peft.get_peft_model_state_dict(model)
    assert len(keys) == len(load_file(run / "lora/adapter_model.safetensors")) == 2 * 2 * 7


THEIRS = {
    "some": {"target_modules": ["q_proj", "v_proj", "down_proj"]},
    "rslora": {"target_modules": "all-linear", "use_rslora": True, "r": 5},
    "one layer": {"target_modules": ["k_proj", "up_proj"], "layers_to_transform": [1]},
    "ranks": {"target_modules": ["q_proj", "o_proj"], "rank_pattern": {"q_proj": 2}},
}


@pytest.mark.parametrize("options", THEIRS.values(), ids=THEIRS)
@torch.no_grad()
def test_we_read_theirs(runs, tmp_path, options):
    hub, plain, _ = runs
    torch.manual_seed(3)
    config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **options)
    model = AutoModelForCausalLM.from_pretrained(hub, attn_implementation="eager")
    before = row_logits(model)
    model = peft.get_peft_model(model, config).eval()
    model.save_pretrained(tmp_path)
    pipeline = TransfusionPipeline.from_pretrained(plain)
    torch.testing.assert_close(our_logits(pipeline), before, **TOLERANCE)
    pipeline.load_lora_weights(tmp_path)
    expected = row_logits(model)
    torch.testing.assert_close(our_logits(pipeline), expected, rtol=1e-5, atol=1e-5)
    assert (expected - before).abs().max() > 0.1


def edit(folder: Path, **changes) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rename(folder: Path, old: str, new: str) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({name.replace(old, new): tensor for name, tensor in load_file(path).items()}, path)


def cut(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: edit(f, use_dora=True), r"adapter_config\.json: use_dora True is not supported"),
        (lambda f: edit(f, peft_type="IA3"), r"peft_type 'IA3' is not supported; an adapter with 'LORA' is"),
        (lambda f: edit(f, alpha_pattern={"q_proj": 3}), r"alpha_pattern .* is not supported"),
        (lambda f: edit(f, lora_alpha=None), r"lora_alpha None is not a number"),
        (lambda f: (f / "adapter_config.json").write_text("{"), r"cannot be read as JSON"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), r"no adapter_model\.safetensors"),
        (cut, r"truncated or damaged"),
        (
            lambda f: rename(f, "q_proj", "w_proj"),
            r"adapts model\.layers.*w_proj.* nearest is .*_proj",
        ),
        (lambda f: rename(f, "lora_A.weight", "lora_magnitude"), r"lora_magnitude is not the update of"),
        (lambda f: rename(f, "0.self_attn.q_proj.lora_A", "9.x.lora_A"), r"is missing; fetch it again"),
        (lambda f: rename(f, "up_proj", "down_proj"), r"down_proj has A .* the model's layer has"),
    ],
)
def test_an_adapter_that_cannot_be_used_is_refused(runs, tmp_path, damage, message):
    _, plain, run = runs
    shutil.copytree(run / "lora", tmp_path / "lora")
    damage(tmp_path / "lora")
    pipeline = TransfusionPipeline.from_pretrained(plain)
    before = text_logits(pipeline.model)
    with pytest.raises(UserError, match=message):
        pipeline.load_lora_weights(tmp_path / "lora")
    assert torch.equal(text_logits(pipeline.model), before)
    assert pipeline.get_list_adapters() == []
