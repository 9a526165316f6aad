"""LoRA adapters as PEFT writes and reads them: adapter_config.json and adapter_model.safetensors."""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from megafusion.errors import UserError
from megafusion.model.config import LoraConfig
from megafusion.model.hub_names import hub_names
from megafusion.storage import new_folder, read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX, A, B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
SUPPORTED = {
    "peft_type": "LORA",
    "bias": "none",
    "fan_in_fan_out": False,
    "use_dora": False,
    "use_qalora": False,
    "use_bdlora": None,
    "lora_bias": False,
    "alpha_pattern": {},
    "modules_to_save": None,
    "layer_replication": None,
    "trainable_token_indices": None,
    "target_parameters": None,
}
"""Keys of adapter_config.json that may have these values alone; the others do not change what is computed."""


class Update(NamedTuple):
    """The update of one layer's weight: scale B A, with A [rank, inputs] and B [outputs, rank]."""

    a: Tensor
    b: Tensor
    scale: float


def write_peft_folder(
    folder: Path, weights: dict[str, Tensor], config: LoraConfig, num_layers: int, base: str | None
) -> None:
    """Write the LoRA weights of a run, by canonical name. base: folder or name of the model that is adapted.

    UserError if the folder holds anything but an older adapter.
    """
    tensors, layers = {}, []
    for layer in sorted({name.partition(".lora_")[0] for name in weights}):
        (theirs,) = hub_names([f"{layer}.weight"]).values()
        parts = weights[f"{layer}.lora_a.weight"].chunk(len(theirs))
        for number, (name, a) in enumerate(zip(theirs, parts, strict=True)):
            layers.append(name.removesuffix(".weight"))
            tensors[PREFIX + layers[-1] + A] = a.contiguous()
            tensors[PREFIX + layers[-1] + B] = weights[f"{layer}.lora_b.{number}.weight"].contiguous()
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": _targets(layers, num_layers),
        "bias": "none",
        "inference_mode": True,
    }
    with new_folder(folder, CONFIG) as partial:
        (partial / CONFIG).write_text(json.dumps(values, indent=2) + "\n")
        save_file(tensors, partial / WEIGHTS, {"format": "pt"})


def _targets(layers: list[str], num_layers: int) -> list[str]:
    """The ends of the names of layers that every block has, else the names."""
    ends = [name.rpartition(".")[2] for name in layers]
    return sorted({e if ends.count(e) == num_layers else n for n, e in zip(layers, ends, strict=True)})


def read_peft_folder(folder: Path) -> dict[str, Update]:
    """The updates by the name of the layer in transformers' model. UserError naming what is not supported."""
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(f"{folder}: no {CONFIG}; name a folder that PEFT or a LoRA run wrote")
    values = read_json(path, "fetch it again")
    for key, supported in SUPPORTED.items():
        if (found := values.get(key, supported)) != supported and (found or supported):
            raise UserError(f"{path}: {key} {found!r} is not supported; an adapter with {supported!r} is")
    try:
        tensors = load_file(folder / WEIGHTS)
    except FileNotFoundError as error:
        raise UserError(f"{folder}: no {WEIGHTS}; save the adapter with safe_serialization=True") from error
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / WEIGHTS}: truncated or damaged ({error}); fetch it again") from error
    if other := sorted(name for name in tensors if not (name.startswith(PREFIX) and name.endswith((A, B)))):
        raise UserError(f"{folder / WEIGHTS}: {other[0]} is not the update of a linear layer: unsupported")
    found = {}
    for layer in sorted({name.removesuffix(A).removesuffix(B) for name in tensors}):
        if missing := [layer + end for end in (A, B) if layer + end not in tensors]:
            raise UserError(f"{folder / WEIGHTS}: {missing[0]} is missing; fetch it again")
        found[layer.removeprefix(PREFIX)] = _update(tensors[layer + A], tensors[layer + B], values, path)
    return found


def _update(a: Tensor, b: Tensor, values: dict[str, Any], path: Path) -> Update:
    alpha = values.get("lora_alpha")
    if not isinstance(alpha, int | float):
        raise UserError(f"{path}: lora_alpha {alpha!r} is not a number; give the adapter's own {CONFIG}")
    rank = len(a)
    return Update(a, b, alpha / (math.sqrt(rank) if values.get("use_rslora") else rank))
