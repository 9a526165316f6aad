"""What the rows are made of."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field

from megafusion.config import Config
from megafusion.data.remote import check_location


class SourceConfig(Config):
    """One folder of shards in the mixture."""

    path: Annotated[str, BeforeValidator(lambda v: check_location(v) if isinstance(v, str | Path) else v)]
    """Folder of shards, made by `megafusion preprocess`, or its URL: http(s)://, s3://, gs://."""
    weight: float = Field(1.0, gt=0)
    """Share of the sequence positions that this source gets, beside the other sources' weights."""


class DataConfig(Config):
    """What the rows are made of."""

    renamed_keys: ClassVar[dict[str, str]] = {
        "look_ahead": "packing_buffer_size",
        "image_first_max_timestep": "image_first_max_t",
    }

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
    image_first_max_t: float = Field(0.5, gt=0, le=1)
    """Limit of the noise process's time t for images before their caption (the paper's 500 of 1000 steps)."""
    caption_dropout: float = Field(0.1, ge=0, le=1)
    """Share of caption-first pairs whose caption is left out, which classifier-free guidance needs."""
    crop: float = Field(1.0, gt=0, le=1)
    """Least share of a picture's sides that a random crop keeps; 1: the middle, always. Of sources that keep
    pictures, as `flip`: latents are fixed when they are made."""
    flip: float = Field(0.0, ge=0, le=1)
    """Share of showings in which a picture is mirrored, left to right."""
    packing_buffer_size: int = Field(16, gt=0)
    """Documents held to choose from when a row is packed (best fit)."""
    num_workers: int = Field(0, ge=0)
    """Processes a rank that read and pack ahead of the training; 0: in the step. Changes no row."""
    prefetch: int = Field(2, gt=0)
    """Global batches that workers make ahead; each takes its memory once."""
    on_error: Literal["fail", "skip"] = "fail"
    """What a document does whose bytes are bad: stop the run, or be left out and counted. What depends on the
    moment (a missing shard, a server) always stops the run, for it would change the order of the data."""
    max_skip_rate: float = Field(0.01, gt=0, le=1)
    """Share of documents left out beyond which, by more than chance brings, the run stops."""
    cache_dir: Path = Path("data/cache")
    """Folder on a local disk that keeps the shards of URLs, shared by all processes of a machine."""
    cache_bytes: int = Field(100_000_000_000, gt=0)
    """Most that the cache holds; what was read longest ago goes first."""
