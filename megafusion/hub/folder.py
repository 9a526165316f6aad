"""A Hugging Face folder as what a run starts from, and the configuration of such a run."""

from pathlib import Path

from megafusion.config import parse_config
from megafusion.errors import UserError
from megafusion.generate.folder import check_components
from megafusion.hub.config import model_keys, read_hub_config, sliding_window
from megafusion.images.codec import ImageCodec
from megafusion.images.sizes import Size
from megafusion.model.config import ModelConfig
from megafusion.model.hub_names import EMBEDDING, HEAD
from megafusion.sequence.tokenizer import FILE_NAMES, Tokenizer
from megafusion.storage import write_file
from megafusion.yaml_values import dump_yaml

NOISE_PROCESS = {
    "kind": "flow",
    "prediction_type": "velocity",
    "t_distribution": "logit_normal",
    "logit_mean": 0.8,
    "logit_std": 0.8,
}
"""Of a new run: flow with JiT's times measured best of all (docs/recipe.md)."""


def tokenizer_files(folder: Path) -> list[Path]:
    """The tokenizer's files in a folder, the one that transformers prefers first. UserError without any."""
    found = [folder / name for name in reversed(FILE_NAMES) if (folder / name).is_file()]
    if not found:
        raise UserError(f"{folder}: no {' or '.join(FILE_NAMES)}; put the model's tokenizer there")
    return found


def import_config(folder: Path, out: Path, sizes: list[Size], vae: Path, patch_size: int) -> str:
    """Write what a run needs to start from a Hugging Face folder; returns what to do next."""
    if out.exists():
        raise UserError(f"{out}: exists already; name another --out")
    values = read_hub_config(folder)
    tokenizer = Tokenizer.from_pretrained(tokenizer_files(folder)[0])
    codec = ImageCodec.from_pretrained(vae)
    keys = model_keys(values, folder / "config.json") | {
        "vocab_size": max(values["vocab_size"], tokenizer.num_ids(len(sizes), codec.codebook_size)),
        "codebook_size": codec.codebook_size,
        "latent_channels": codec.latent_channels,
        "latent_downsampling": codec.downsampling,
        "image_sizes": [list(size) for size in sizes],
        "patch_size": patch_size,
    }
    check_components(parse_config(ModelConfig, keys, str(folder)), tokenizer, codec)
    head = [] if keys["tie_embeddings"] else [HEAD]
    section = {
        "data": {"tokenizer": str(tokenizer.path), "vae": str(vae)},
        "model": keys,
        "train": {"init_from": str(folder), "init_new": ["*.adapter.*", EMBEDDING, *head]},
    }
    if not codec.codebook_size:
        section["objective"] = {"noise_process": NOISE_PROCESS}
        section["sampling"] = {"sampler": "euler", "num_inference_steps": 25}
    write_file(out, dump_yaml(section))
    window = sliding_window(values)
    return (
        f"{out}: add out, data.sources, data.sequence_length"
        + (f" (at most {window}, the model's sliding_window)" if window else "")
        + f", data.images_per_row, data.num_streams and the rest of train, then megafusion train {out}"
    )
