"""Pipeline folders: config.json, model.safetensors, the tokenizer and vae/."""

import json
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file

from megafusion.config import Config, parse_config
from megafusion.errors import UserError
from megafusion.images.codec import ImageCodec
from megafusion.model.config import ModelConfig
from megafusion.model.transfusion import Transfusion
from megafusion.objective.config import ObjectiveConfig, SamplingConfig
from megafusion.sequence.tokenizer import Tokenizer

CONFIG, WEIGHTS = "config.json", "model.safetensors"
MIN_PADDING = 1024
"""Rows of a padded vocabulary beyond its ids that are always allowed; more, if under a 32nd of the ids."""


class PipelineConfig(Config):
    """config.json of a pipeline folder."""

    renamed_keys: ClassVar[dict[str, str]] = {"image_size": "model.image_sizes"}

    format: Literal["megafusion-pipeline/2"] = "megafusion-pipeline/2"
    """Version of the folder's layout and keys."""
    model: ModelConfig
    objective: ObjectiveConfig
    sampling: SamplingConfig
    """Defaults of how images and text are sampled."""
    sequence_length: int | None = Field(None, gt=0)
    """Positions of a row in training: the longest prompt with its answer. Not known of older pipelines."""
    training_flops: float | None = Field(None, ge=0)
    """FLOPs of the run until these weights, not of what it started from. Not known of older runs."""


def build_model(config: PipelineConfig) -> Transfusion:
    """The model of a pipeline, with weights at random, which may be moved to any device and dtype.

    So attention is sdpa or auto: another backend may support only those of training.
    """
    attention = "sdpa" if config.model.attention == "sdpa" else "auto"
    return Transfusion(config.model.model_copy(update={"attention": attention}), config.objective)


def load_model(folder: Path, config: PipelineConfig) -> Transfusion:
    """The model of a folder, of safetensors alone. Raises UserError for weights of another model."""
    try:
        weights = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: not a readable pipeline folder ({error})") from error
    model = build_model(config)
    shapes = {name: tensor.shape for name, tensor in model.weights().items()}
    found = {name: tensor.shape for name, tensor in weights.items()}
    if wrong := sorted(name for name in shapes | found if shapes.get(name) != found.get(name)):
        raise UserError(
            f"{folder / WEIGHTS}: names or shapes differ from config.json's model, first {wrong[0]}"
        )
    for name, tensor in model.weights().items():
        tensor.copy_(weights[name])
    return model


def read_pipeline_config(folder: Path) -> PipelineConfig:
    """config.json of a pipeline folder."""
    try:
        values = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{folder}: not a readable pipeline folder ({error})") from error
    return parse_config(PipelineConfig, values, str(folder / CONFIG))


def check_components(model: ModelConfig, tokenizer: Tokenizer, codec: ImageCodec) -> None:
    """Raise UserError if the tokenizer or the autoencoder does not fit the model's configuration."""
    if model.codebook_size != (codes := codec.codebook_size):
        kind = f"a VQModel with {codes} codes" if codes else "an AutoencoderKL, whose images are latents"
        keys = f"{codes}, model.latent_channels: 0, model.patch_size: 1" if codes else "0"
        raise UserError(
            f"model.codebook_size is {model.codebook_size}, but the autoencoder is {kind}; set "
            f"model.codebook_size: {keys}, or give the autoencoder of the model"
        )
    num_more = len(model.image_sizes) - 1
    num_ids = tokenizer.num_ids(len(model.image_sizes), model.codebook_size)
    max_ids = num_ids + max(MIN_PADDING, num_ids // 32)
    if not num_ids <= model.vocab_size <= max_ids:
        beside = f", and a boi for each of the {num_more} further model.image_sizes" if num_more else ""
        beside += f", and {model.codebook_size} codes" if model.codebook_size else ""
        raise UserError(
            f"model.vocab_size {model.vocab_size}, but {tokenizer.path} has {num_ids} ids (its tokens, boi "
            f"and eoi{beside}); set model.vocab_size: {num_ids} (up to {max_ids} where "
            "the vocabulary is padded), leave it out, or give the tokenizer of the model"
        )
    for key, found in (("channels", codec.latent_channels), ("downsampling", codec.downsampling)):
        if (wanted := getattr(model, f"latent_{key}")) != found:
            raise UserError(
                f"model.latent_{key} is {wanted}, but the autoencoder's is {found}; set model.latent_{key}: "
                f"{found}, leave it out, or give the autoencoder of the model"
            )
