"""Weights of a folder of transformers' Llama family, under the names here."""

from collections.abc import Iterable
from pathlib import Path

from megafusion.checkpoint.safetensors_reader import SafetensorsWeights, open_safetensors
from megafusion.model.hub_names import hub_names


def open_hub_weights(folder: Path, names: Iterable[str], is_tied: bool) -> SafetensorsWeights:
    """A folder's weights under the names here; what none of the names stands for keeps its own.

    names: of a model's weights. is_tied: whether the folder's head is its embedding.
    """
    stored = open_safetensors(folder)
    if is_tied:
        stored.pop("lm_head.weight", None)
    parts = {}
    for name, theirs in hub_names(names).items():
        if all(part in stored for part in theirs):
            parts[name] = [stored.pop(part) for part in theirs]
    # Older versions of transformers stored what rope is computed from.
    others = {name: [part] for name, part in stored.items() if not name.endswith(".inv_freq")}
    return SafetensorsWeights(folder, parts | others)
