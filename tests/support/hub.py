"""Small models of transformers' families with random weights, as folders, and the same models here."""

import shutil
from copy import deepcopy
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama import LlamaConfig
from transformers.models.mistral import MistralConfig
from transformers.models.qwen2 import Qwen2Config
from transformers.models.qwen3 import Qwen3Config

from megafusion.checkpoint.reader import fill_tensors
from megafusion.config import parse_config
from megafusion.generate.folder import PipelineConfig
from megafusion.generate.pipeline import TransfusionPipeline
from megafusion.hub.config import model_keys, read_hub_config
from megafusion.hub.weights import open_hub_weights
from megafusion.model.config import ModelConfig
from megafusion.model.hub_names import hub_names
from megafusion.model.transfusion import Transfusion
from megafusion.objective.config import ObjectiveConfig, SamplingConfig
from tests.support.small import TOKENIZER
from tests.support.weights import initialize

PIECES = 2046
SIZES = {
    "vocab_size": PIECES,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES = {
    "llama2": LlamaConfig(**SIZES | {"num_key_value_heads": 4}),
    "llama3": LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "smollm2": LlamaConfig(**SIZES, tie_word_embeddings=True, rms_norm_eps=1e-5),
    "mistral": MistralConfig(**SIZES, head_dim=16, sliding_window=None),
    "qwen2": Qwen2Config(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    "qwen2.5": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True),
}
IMAGES = {
    "vocab_size": PIECES + 2,
    "latent_channels": 4,
    "latent_downsampling": 4,
    "image_sizes": [[32, 32]],
    "patch_size": 2,
}


def make_folder(
    folder: Path, family: str, *, shard_size: str = "5GB", dtype=torch.float32, vocab_size: int = PIECES
) -> PreTrainedModel:
    """Write a family's model, with our tokenizer unless the folder has one; returns the model."""
    torch.manual_seed(0)
    config = deepcopy(FAMILIES[family])
    config.vocab_size = vocab_size
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():  # biases and norms, too
        for name, parameter in model.named_parameters():
            parameter.normal_(mean=float("norm" in name), std=0.1)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    if not (folder / "tokenizer.json").is_file():
        shutil.copyfile(TOKENIZER, folder / "tokenizer.model")
    return model


def load_here(folder: Path, **changes) -> Transfusion:
    """The model of a folder with as many token ids, and random adapters."""
    values = read_hub_config(folder)
    keys = IMAGES | {"vocab_size": values["vocab_size"]} | model_keys(values, folder) | changes
    model = Transfusion(parse_config(ModelConfig, keys, "test"), ObjectiveConfig())
    initialize(model, 2, seed=0)
    text = {name: model.weights()[name] for name in hub_names(model.weights())}
    fill_tensors(open_hub_weights(folder, text, values.get("tie_word_embeddings", False)), text)
    return model.eval()


def pipeline_from(folder: Path, tokenizer, codec) -> TransfusionPipeline:
    """A folder's model with two more token ids, as a run from it has."""
    text_model = load_here(folder)
    config = text_model.config.model_copy(update={"vocab_size": PIECES + 2})
    model = Transfusion(config, ObjectiveConfig())
    initialize(model, 2, seed=1)
    for name, weight in text_model.weights().items():
        model.weights()[name][: len(weight)] = weight
    pipeline_config = PipelineConfig(model=config, objective=ObjectiveConfig(), sampling=SamplingConfig())
    return TransfusionPipeline(model, tokenizer, codec, pipeline_config)
