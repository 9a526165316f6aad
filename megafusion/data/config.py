"""Configuration of the training data."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from megafusion.config import Config
from megafusion.data.remote import check_location


class SourceConfig(Config):
    """One folder of shards in the mixture."""

    path: Annotated[str, BeforeValidator(lambda v: check_location(v) if isinstance(v, str | Path) else v)]
    """Folder of shards, made by `megafusion preprocess`, or its URL: http(s)://, s3://, gs://."""
    weight: float = Field(1.0, gt=0)
    """Share of the sequence positions that this source gets, relative to the other sources' weights."""


class ValidationConfig(Config):
    """Held-out documents, whose losses are measured while training on the same rows and the same noise."""

    sources: dict[str, SourceConfig] = Field(min_length=1)
    """Folders of shards, by name, mixed as those of training; captions are never dropped."""
    every: int = Field(gt=0)
    """Steps between two measurements, a multiple of telemetry.log_every; the last step is always measured."""
    num_batches: int = Field(4, gt=0)
    """Global batches of a measurement, packed at the start and kept in memory."""


class DataConfig(Config):
    """The mixture of sources, and how documents are packed, sampled and read."""

    renamed_keys: ClassVar[dict[str, str]] = {
        "look_ahead": "packing_buffer_size",
        "image_first_max_timestep": "image_first_max_t",
    }
    max_integer: ClassVar[int] = 2**24

    sources: dict[str, SourceConfig] = Field(min_length=1)
    """The mixture, by name."""
    validation: ValidationConfig | None = None
    """Losses on held-out documents while training; null for none. Changes nothing in the training."""
    tokenizer: Path
    """SentencePiece model, tokenizer.json, or a folder with one of them; must be the one that the shards were
    made with."""
    vae: Path
    """diffusers AutoencoderKL folder, or a VQModel's for a model with a codebook; must be the one that the
    shards were made with."""
    sequence_length: int = Field(gt=0)
    """Positions S of a packed sequence."""
    images_per_row: int = Field(ge=1)
    """Image slots N of a packed sequence; with a codebook, its most images."""
    num_streams: int = Field(gt=0)
    """Logical streams M: they define the data order. A multiple of train.global_batch_size."""
    caption_first: float = Field(0.8, ge=0, le=1)
    """Share of pairs in which the caption comes before the image."""
    image_first_max_t: float = Field(0.5, gt=0, le=1)
    """Limit of the noise process's time t for images before their caption (the paper's 500 of 1000 steps);
    by default 1 with clean_context, where no text sees the noise."""
    clean_context: bool = False
    """An image with a loss stands twice in a row: clean in its place, for what follows it, and noised behind
    its document, where it sees what is before it and itself, and nothing else sees it (BAGEL's mask, arXiv
    2505.14683). It takes twice its positions."""
    t_per: Literal["image", "document"] = "image"
    """Whether each image has a time t of its own (as diffusion forcing, arXiv 2407.01392), or all images of a
    document share one. With different limits they share the quantile of t below each one's limit."""
    caption_dropout: float = Field(0.1, ge=0, le=1)
    """Share of caption-first pairs whose caption is dropped, for classifier-free guidance."""
    crop: float = Field(1.0, gt=0, le=1)
    """Minimum share of an image's sides that a random crop keeps; 1: always the centre crop. As flip, only
    for sources that keep pixels: stored latents are fixed."""
    flip: float = Field(0.0, ge=0, le=1)
    """Probability that an image is mirrored, left to right, each time it is used."""
    packing_buffer_size: int = Field(16, gt=0)
    """Documents to choose from when a sequence is packed (best fit)."""
    num_workers: int = Field(0, ge=0, le=1024)
    """Processes of a rank that read and pack ahead; 0: the trainer does. Does not change the data."""
    prefetch: int = Field(2, gt=0)
    """Global batches that workers build ahead; each is held in memory."""
    on_error: Literal["fail", "skip"] = "fail"
    """Whether a document whose bytes are bad stops the run, or is skipped and counted. A missing shard or a
    failing server always stops the run, because skipping it would change the data order."""
    max_skip_rate: float = Field(0.01, gt=0, le=1)
    """Maximum fraction of skipped documents (with a 3-sigma margin); beyond it the run stops."""
    cache_dir: Path = Path("data/cache")
    """Folder on a local disk that caches the shards of URLs, shared by all processes of a machine."""
    cache_bytes: int = Field(100_000_000_000, gt=0, lt=2**63)
    """Maximum size of the cache; the least recently opened shards are evicted first."""

    @model_validator(mode="before")
    @classmethod
    def _no_limit_of_noise(cls, values: Any) -> Any:
        is_clean = isinstance(values, dict) and values.get("clean_context") is True
        return {"image_first_max_t": 1.0} | values if is_clean else values

    @model_validator(mode="after")
    def _consistent(self) -> "DataConfig":
        if self.clean_context and self.image_first_max_t < 1:
            raise ValueError(
                f"image_first_max_t {self.image_first_max_t} limits the noise of images that texts see, but "
                "with clean_context true they see none; leave image_first_max_t out, or set it to 1"
            )
        return self
