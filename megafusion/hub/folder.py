"""A Hugging Face folder as what a run starts from, and the configuration of such a run."""

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from megafusion.config import parse_config
from megafusion.errors import UserError
from megafusion.hub.config import model_keys, read_hub_config, sliding_window
from megafusion.hub.weights import EMBEDDING, HEAD
from megafusion.images.codec import ImageCodec
from megafusion.images.sizes import Size
from megafusion.model.config import ModelConfig
from megafusion.sequence.tokenizer import Tokenizer
from megafusion.storage import write_file


def check_vocabulary(folder: Path, values: dict[str, Any]) -> Tokenizer:
    """The tokenizer of a Hugging Face folder. UserError if its ids are not the rows of the embedding."""
    tokenizer = Tokenizer.from_pretrained(folder)
    if values["vocab_size"] != tokenizer.boi:
        raise UserError(
            f"{folder / 'config.json'}: vocab_size {values['vocab_size']}, but {tokenizer.path} has "
            f"{tokenizer.boi} pieces; padded vocabularies are not served yet"
        )
    return tokenizer


def import_config(folder: Path, out: Path, sizes: list[Size], vae: Path, patch_size: int) -> str:
    """Write what a run needs to start from a Hugging Face folder; returns what to do next."""
    if out.exists():
        raise UserError(f"{out}: exists already; name another --out")
    values = read_hub_config(folder)
    tokenizer, codec = check_vocabulary(folder, values), ImageCodec.from_pretrained(vae)
    keys = model_keys(values, folder / "config.json") | {
        "vocab_size": tokenizer.num_ids(len(sizes)),
        "latent_channels": codec.latent_channels,
        "latent_downsampling": codec.downsampling,
        "image_sizes": [list(size) for size in sizes],
        "patch_size": patch_size,
    }
    parse_config(ModelConfig, keys, str(folder))
    head = [] if keys["tie_embeddings"] else [HEAD]
    text = OmegaConf.to_yaml(
        OmegaConf.create(
            {
                "data": {"tokenizer": str(tokenizer.path), "vae": str(vae)},
                "model": keys,
                "train": {"init_from": str(folder), "init_new": ["*.adapter.*", EMBEDDING, *head]},
            }
        )
    )
    write_file(out, text)
    window = sliding_window(values)
    return (
        f"{out}: add out, data.sources, data.sequence_length"
        + (f" (at most {window}, the model's sliding_window)" if window else "")
        + f", data.images_per_row, data.num_streams and the rest of train, then megafusion train {out}"
    )
