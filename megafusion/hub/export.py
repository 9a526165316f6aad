"""The text path of a model as a folder that transformers loads."""

import json
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from megafusion.generate.pipeline import TransfusionPipeline
from megafusion.hub.config import hub_config
from megafusion.model.config import ModelConfig
from megafusion.model.hub_names import EMBEDDING, HEAD, hub_names
from megafusion.storage import new_folder

MARKER = "generation_config.json"
"""A file of these folders that no pipeline folder has."""
Dtype = Literal["float32", "bfloat16", "float16"]


def export_text_model(
    pipeline: TransfusionPipeline, out: Path, base: dict[str, Any], card: str, dtype: Dtype
) -> None:
    """Write config.json, safetensors, the tokenizer, generation_config.json and README.md (the card).

    Without rows of new image ids. base: keys of config.json that the model does not decide, and vocab_size.
    UserError if no architecture fits the model, or the folder holds anything but an older export.
    """
    model, tokenizer = pipeline.config.model, pipeline.tokenizer
    ids = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos}
    num_rows = base.get("vocab_size", tokenizer.num_text_ids)
    config = hub_config(model, num_rows, ids | base)
    config["dtype" if "dtype" in base else "torch_dtype"] = dtype
    from huggingface_hub import save_torch_state_dict

    with new_folder(out, MARKER) as partial:
        _write_json(partial / "config.json", config)
        _write_json(partial / MARKER, ids)
        weights = _text_weights(pipeline.model.weights(), model, num_rows, getattr(torch, dtype))
        save_torch_state_dict(weights, partial)
        tokenizer.save_pretrained(partial)
        if not (partial / "tokenizer_config.json").is_file():
            _write_json(partial / "tokenizer_config.json", tokenizer.transformers_config())
        (partial / "README.md").write_text(card)


def _text_weights(
    weights: dict[str, Tensor], model: ModelConfig, num_rows: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    found = {}
    q_size, kv_size = (heads * model.head_size for heads in (model.num_heads, model.kv_heads))
    for name, theirs in hub_names(weights).items():
        weight = weights[name][:num_rows] if name in (EMBEDDING, HEAD) else weights[name]
        sizes = {1: [len(weight)], 2: [model.ffn_size] * 2, 3: [q_size, kv_size, kv_size]}[len(theirs)]
        for part, values in zip(theirs, weight.split(sizes), strict=True):
            found[part] = values.to(dtype, copy=True, memory_format=torch.contiguous_format)
    return found


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")
