"""Names of a model's text weights in transformers' Llama family."""

from collections.abc import Iterable

IMAGES = "image_"
"""Begins the name of a weight that image patches have of their own, beside the texts' of the same name."""
EMBEDDING, HEAD = "stem.embedding.weight", "tail.head.weight"
_ENDS = {EMBEDDING: "model.embed_tokens", "tail.norm.weight": "model.norm", HEAD: "lm_head"}
_BLOCK = {
    "attention_norm": ["input_layernorm"],
    "attention.qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attention.q_norm": ["self_attn.q_norm"],
    "attention.k_norm": ["self_attn.k_norm"],
    "attention.out": ["self_attn.o_proj"],
    "feed_forward_norm": ["post_attention_layernorm"],
    "feed_forward.gate_up": ["mlp.gate_proj", "mlp.up_proj"],
    "feed_forward.down": ["mlp.down_proj"],
}


def hub_names(names: Iterable[str]) -> dict[str, list[str]]:
    """By the name of a text weight here, the weights there that it consists of, along dimension 0."""
    found = {}
    for name in names:
        module, _, key = name.rpartition(".")
        if name in _ENDS:
            found[name] = [f"{_ENDS[name]}.{key}"]
        elif module.startswith("blocks.") and not key.startswith(IMAGES):
            _, index, inner = module.split(".", 2)
            found[name] = [f"model.layers.{index}.{part}.{key}" for part in _BLOCK[inner]]
    return found
