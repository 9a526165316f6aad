"""config.json of an autoencoder: the keys that are read, and those that are refused. Imports no torch."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megafusion.errors import UserError
from megafusion.storage import read_json

CONFIG_NAME = "config.json"
CLASSES = ("AutoencoderKL", "VQModel")


class CodecConfig(BaseModel):
    """Keys of an AutoencoderKL or a VQModel, with defaults, that say how images become latents or codes."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)

    in_channels: int = Field(3, gt=0)
    out_channels: int = Field(3, gt=0)
    block_out_channels: tuple[int, ...] = Field((64,), min_length=1)
    latent_channels: int = Field(4, gt=0)
    scaling_factor: float = Field(0.18215, gt=0)
    shift_factor: float | None = None
    num_vq_embeddings: int = Field(0, ge=0, le=2**24)
    """Codes of a VQModel's codebook; 0: an AutoencoderKL."""
    latents_mean: None = None
    latents_std: None = None

    @classmethod
    def parse(cls, values: Mapping[str, Any], where: str) -> "CodecConfig":
        """Validate a configuration, of which other keys are ignored. Raises UserError naming the key."""
        known = {key: values[key] for key in cls.model_fields if key in values}
        try:
            config = cls.model_validate_json(json.dumps(known))
        except ValidationError as error:
            detail = error.errors()[0]
            key, reason = detail["loc"][0], f"{detail['msg']} (got {detail['input']!r:.40})"
            if key in ("latents_mean", "latents_std"):
                reason = "statistics of each channel are not supported; scaling_factor and shift_factor are"
            raise UserError(f"{where}: key {key!r}: {reason}") from error
        channels = config.in_channels
        if 3 * config.unshuffle**2 != channels or config.out_channels != channels:
            raise UserError(
                f"{where}: in_channels {channels}, out_channels {config.out_channels}: both must be the same "
                "3 f^2 (3, 12, 27, 48, ...)"
            )
        return config

    @property
    def model_channels(self) -> int:
        """Channels of the latents that a transformer is trained on; 0 where it is trained on codes."""
        return 0 if self.num_vq_embeddings else self.latent_channels

    @property
    def unshuffle(self) -> int:
        """Side f of the blocks of pixels that are read as 3 f^2 channels."""
        return round((self.in_channels / 3) ** 0.5)

    @property
    def downsampling(self) -> int:
        """Pixels per latent along a side."""
        return self.unshuffle * 2 ** (len(self.block_out_channels) - 1)


def read_codec_config(folder: Path) -> dict[str, Any]:
    """config.json of an AutoencoderKL's or a VQModel's folder with safetensors weights, with its
    `_class_name`. Raises UserError for another."""
    named = " or ".join(CLASSES)
    advice = f"name a diffusers {named} folder (config.json and safetensors), or train one: train-vae"
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise UserError(f"{folder}: no {CONFIG_NAME} there; {advice}")
    config = read_json(path, advice)
    if (found := config.get("_class_name")) not in CLASSES:
        raise UserError(f"{path}: a {found or 'model without _class_name'}, not an {named}; {advice}")
    if found == "VQModel":
        config.setdefault("num_vq_embeddings", 256)  # diffusers' default
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{folder}: no safetensors weights there; pickled ones are not read; {advice}")
    return config
