"""Keys of the model that a run may leave out: they are taken from its data. Imports no torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megafusion.config import Config, parse_config
from megafusion.data.config import DataConfig
from megafusion.data.manifest import load_manifest
from megafusion.errors import UserError
from megafusion.images.codec_config import CONFIG_NAME, CodecConfig, read_codec_config
from megafusion.model.config import ModelConfig
from megafusion.sequence.tokenizer import Tokenizer
from megafusion.train.config import RunConfig
from megafusion.yaml_values import load_values

KEYS = ModelConfig.keys_from_data


class _Data(Config):
    data: DataConfig


def load_training_config(path: Path | str, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration of a run to start or resume, in full. Raises UserError as load_config does."""
    values = load_values(path, overrides)
    model = values.get("model") if isinstance(values, dict) else None
    if not isinstance(model, dict):
        return parse_config(RunConfig, values, str(path))
    missing = [key for key in KEYS if key not in model]
    if missing and "latent_shape" not in model:  # which earlier versions had in their place
        given = {key: value for key, value in values.items() if key == "data"}
        data = parse_config(_Data, given, str(path)).data
        try:
            known = {key: model[key] for key in (*KEYS, "codebook_size") if key in model}
            values["model"] = model | _from_data(data, known)
        except UserError as error:
            names = ", ".join(f"model.{key}" for key in missing)
            raise UserError(f"{path}: without {names}, which the data cannot give: {error}") from error
    return parse_config(RunConfig, values, str(path))


def _from_data(data: DataConfig, known: dict[str, Any]) -> dict[str, Any]:
    """KEYS and codebook_size of a model that fits the data; those that are known are kept."""
    codec = CodecConfig.parse(read_codec_config(data.vae), str(data.vae / CONFIG_NAME))
    found = {
        "latent_channels": codec.model_channels,
        "latent_downsampling": codec.downsampling,
        "codebook_size": codec.num_vq_embeddings,
    } | known
    if "image_sizes" not in found:
        found["image_sizes"] = _image_sizes(data, codec.downsampling)
    if "vocab_size" not in found and isinstance(sizes := found["image_sizes"], list):
        tokenizer = Tokenizer.from_pretrained(data.tokenizer)
        found["vocab_size"] = tokenizer.num_ids(len(sizes), codec.num_vq_embeddings)
    return found


def _image_sizes(data: DataConfig, downsampling: int) -> list[list[int]]:
    """Heights and widths in pixels of the latents of all sources, in the sources' order."""
    shapes = [shape for source in data.sources.values() for shape in load_manifest(source.path).latent_shapes]
    if not shapes:
        raise UserError("no source holds latents, whose sizes would be the image_sizes; give them")
    return [list(size) for size in dict.fromkeys((h * downsampling, w * downsampling) for _, h, w in shapes)]
