"""What the rows are made of."""

from pathlib import Path

from pydantic import Field

from megafusion.config import Config


class SourceConfig(Config):
    """One folder of shards in the mixture."""

    path: Path
    """Folder of shards, made by `megafusion preprocess`."""
    weight: float = Field(1.0, gt=0)
    """Share of the sequence positions that this source gets, beside the other sources' weights."""


class DataConfig(Config):
    """What the rows are made of."""

    sources: dict[str, SourceConfig] = Field(min_length=1)
    """The mixture, by name."""
    tokenizer: Path
    """SentencePiece model; must be the one that the shards were made with."""
    vae: Path
    """diffusers AutoencoderKL folder; must be the one that the shards were made with."""
    sequence_length: int = Field(gt=0)
    """Positions S of a row."""
    images_per_row: int = Field(ge=1)
    """Image slots N of a row."""
    num_streams: int = Field(gt=0)
    """Logical streams M: fixes the data order for good; a multiple of the rows of a global batch."""
    caption_first: float = Field(0.8, ge=0, le=1)
    """Share of pairs in which the caption stands before the image."""
    image_first_max_timestep: int = Field(500, gt=0)
    """Timesteps stay below this where the image stands before its caption: the paper's noise limit."""
    caption_dropout: float = Field(0.1, ge=0, le=1)
    """Share of caption-first pairs whose caption is left out, which classifier-free guidance needs."""
    look_ahead: int = Field(16, gt=0)
    """Documents held to choose from when a row is packed (best fit)."""
