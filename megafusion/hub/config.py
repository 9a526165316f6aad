"""config.json of Hugging Face's text models, and the model keys that it stands for. Imports no torch."""

from pathlib import Path
from typing import Any

from megafusion.errors import UserError
from megafusion.model.config import ModelConfig, RopeScaling
from megafusion.storage import read_json

# Each architecture, and the model keys that it implies.
ARCHITECTURES: dict[str, dict[str, bool]] = {
    "LlamaForCausalLM": {},
    "MistralForCausalLM": {},
    "Qwen2ForCausalLM": {"attention_bias": True},
    "Qwen3ForCausalLM": {"qk_norm": True},
}
KEYS = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "intermediate_size": "ffn_hidden_size",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
}
OPTIONAL = {"head_dim": None, "tie_word_embeddings": False}
SUPPORTED = {
    "hidden_act": "silu",
    "mlp_bias": False,
    "attention_bias": False,  # of Llama and Qwen3: it would be one of the output projection too
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}
"""Keys that a model may have with these values alone."""


def read_hub_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder whose model is supported. UserError naming what is not."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder}: no config.json; name a folder that transformers loads")
    values = read_json(path)
    try:
        (architecture,) = values["architectures"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not the configuration of one transformers model ({error!r})") from error
    if architecture not in ARCHITECTURES:
        raise UserError(
            f"{path}: architecture {architecture} is not supported; supported: {', '.join(ARCHITECTURES)}"
        )
    for key, supported in SUPPORTED.items():
        if (found := values.get(key, supported)) not in (supported, None):
            raise UserError(f"{path}: {key} {found} is not supported; a model with {supported} is")
    if missing := sorted({*KEYS, "vocab_size"} - OPTIONAL.keys() - values.keys()):
        raise UserError(f"{path}: no {', '.join(missing)}; give the model's own config.json")
    return values


def model_keys(values: dict[str, Any], origin: Path) -> dict[str, Any]:
    """The keys of `model` for a text model's config.json, read from `origin`, as plain values."""
    keys = {ours: values.get(theirs, OPTIONAL.get(theirs)) for theirs, ours in KEYS.items()}
    keys["post_norm"] = False
    return keys | ARCHITECTURES[values["architectures"][0]] | _rope(values, origin)


def sliding_window(values: dict[str, Any]) -> int | None:
    """Positions up to which the model's attention is that of ours: all of them if None."""
    layers = values.get("layer_types")
    if layers is not None:
        slides = "sliding_attention" in layers
    elif "use_sliding_window" in values or values["architectures"][0].startswith("Qwen"):
        # Qwen's first max_window_layers attend to everything.
        slides = bool(values.get("use_sliding_window")) and (
            values.get("max_window_layers", 0) < values["num_hidden_layers"]
        )
    else:
        slides = True
    return values.get("sliding_window") if slides else None


def hub_config(model: ModelConfig, vocab_size: int, base: dict[str, Any]) -> dict[str, Any]:
    """config.json of a model's text path. base: that of the text model that it began as, or empty.

    UserError if no architecture has all of the model's keys.
    """
    if model.post_norm:
        raise UserError("no architecture of transformers that is supported has model.post_norm")
    implied = {key: getattr(model, key) for key in ("attention_bias", "qk_norm")}
    fitting = [
        architecture
        for architecture, keys in ARCHITECTURES.items()
        if implied == {"attention_bias": False, "qk_norm": False} | keys
    ]
    if not fitting:
        raise UserError("no architecture of transformers has both model.attention_bias and model.qk_norm")
    architecture = next((a for a in base.get("architectures", ()) if a in fitting), fitting[0])
    values = model.model_dump(mode="json")
    own = {theirs: values[ours] for theirs, ours in KEYS.items()}
    # A default that the model began with stays unsaid.
    own = {key: value for key, value in own.items() if key in base or value is not None}
    kept = {key: v for key, v in base.items() if key not in ("rope_theta", "rope_scaling", "rope_parameters")}
    return {
        "architectures": [architecture],
        "model_type": architecture.removesuffix("ForCausalLM").lower(),
        "hidden_act": "silu",
        **kept,
        **own,
        **_hub_rope(model, base),
        "vocab_size": vocab_size,
    }


def _rope(values: dict[str, Any], origin: Path) -> dict[str, Any]:
    """Both forms: rope_theta beside rope_scaling, and rope_parameters (transformers 5)."""
    rope = dict(values.get("rope_parameters") or values.get("rope_scaling") or {})
    theta = rope.pop("rope_theta", values.get("rope_theta", 10_000.0))
    kinds = {rope.pop(key) for key in ("rope_type", "type") if key in rope} or {"default"}
    unknown = rope.keys() - RopeScaling.model_fields.keys()
    if kinds == {"default"} and not rope:
        return {"rope_theta": float(theta), "rope_scaling": None}
    if kinds != {"llama3"} or unknown:
        kind = ", ".join(map(str, [*kinds, *sorted(unknown)]))
        raise UserError(f"{origin}: rope scaling {kind} is not supported; llama3 is, and none")
    rope.setdefault("original_max_position_embeddings", values.get("max_position_embeddings"))
    return {"rope_theta": float(theta), "rope_scaling": {"kind": "llama3", **rope}}


def _hub_rope(model: ModelConfig, base: dict[str, Any]) -> dict[str, Any]:
    scaling = model.rope_scaling and {
        "rope_type": "llama3",
        **model.rope_scaling.model_dump(exclude={"kind"}),
    }
    if "rope_parameters" in base:
        return {
            "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta, **(scaling or {})}
        }
    return {"rope_theta": model.rope_theta, "rope_scaling": scaling}
