"""Configuration of preprocessing: inputs, filters, and how shards are written."""

from fractions import Fraction
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from data_prep.augmentation import CopiesConfig
from megafusion.config import Config
from megafusion.data.manifest import FOLDERS, Kind
from megafusion.images.sizes import Size, format_sizes

Pixels = Annotated[int, Field(gt=0, le=16_384)]
KEYS_WITHOUT_EFFECT = {"out", "num_workers", "max_skip_rate", "overwrite"}
"""Keys of PreprocessConfig that change no byte of a shard."""
PATHS_OF_INPUTS = {"images", "keys", "texts", "documents", "document_images"}
_KEYS_OF_ALL = ("filters", "documents_per_shard", "on_error")
_KEYS_OF_IMAGES = ("image_sizes", "image_storage", "batch_size", *_KEYS_OF_ALL)
KEYS_OF_KIND: dict[Kind, tuple[str, ...]] = {
    "pair": ("images", "keys", "image_column", "caption_column", "augmentation", *_KEYS_OF_IMAGES),
    "text": ("texts", "text_column", *_KEYS_OF_ALL),
    "interleaved": ("documents", "document_images", "split", *_KEYS_OF_IMAGES),
}
"""Keys that its shards depend on, besides the tokenizer and the autoencoder; its inputs first."""


class ScoreRange(Config):
    """Range of a score; images outside it are dropped."""

    renamed_keys: ClassVar[dict[str, str]] = {"least": "min", "most": "max"}

    min: float = float("-1e308")
    """Lowest score that is kept."""
    max: float = float("1e308")
    """Highest score that is kept."""


class FilterConfig(Config):
    """Which records are kept. Dropped ones are counted by reason, and are not errors."""

    min_side: int = Field(1, gt=0)
    """Minimum pixels of an image's shorter side."""
    max_aspect: float | None = Field(None, ge=1)
    """Maximum ratio of an image's longer side to its shorter one."""
    min_caption: int = Field(1, gt=0)
    """Minimum characters of a caption."""
    max_caption: int | None = Field(None, gt=0)
    """Maximum characters of a caption."""
    duplicates: Literal["keep", "exact", "perceptual"] = "keep"
    """exact: of equal image bytes or equal texts only the first is kept; perceptual: also of pairs' images
    with near-equal pHash, which sees shapes but no colors."""
    max_distance: int = Field(0, ge=0, le=4)
    """Maximum Hamming distance of the 64-bit pHashes of perceptual duplicates."""
    scores: dict[str, ScoreRange] = Field({})
    """Ranges by score name, as in an image's .json or a parquet column, for example aesthetic scores."""


class SplitConfig(Config):
    """Limits beyond which an interleaved document is split, between segments and within texts."""

    tokens: int = Field(2048, gt=0)
    """Maximum text tokens of a document with images."""
    images: int = Field(4, gt=0)
    """Maximum images of a document."""


class PreprocessConfig(Config):
    """Inputs, filters, and how shards are written."""

    renamed_keys: ClassVar[dict[str, str]] = {
        "pictures": "images",
        "image_size": "image_sizes",
        "more_image_sizes": "image_sizes",
        "document_pictures": "document_images",
        "picture_column": "image_column",
    }
    moved_values: ClassVar[dict[tuple[str, str], str]] = {
        ("images", "latents"): "image_storage: latents ('images' names the inputs now, as 'pictures' did)",
        ("images", "pictures"): "image_storage: pixels ('images' names the inputs now, as 'pictures' did)",
    }

    out: Path
    """Folder for one folder of shards per kind: pairs/, text/ and interleaved/."""
    tokenizer: Path
    """SentencePiece model, tokenizer.json, or a folder with one of them."""
    vae: Path
    """diffusers AutoencoderKL folder; or a VQModel's, for a model whose images are tokens."""
    images: tuple[Path, ...] = ()
    """Captioned images: webdataset tars with an image and a .txt caption per key, parquet files, images with
    .txt files beside them, folders of these, or patterns of paths."""
    keys: Path | None = None
    """UTF-8 file of the keys of images to keep, one per line; all by default."""
    image_sizes: tuple[tuple[Pixels, Pixels], ...] = Field(((64, 64),), min_length=1)
    """Heights and widths in pixels. Each image goes to the size whose aspect ratio is nearest to its own, is
    resized to cover it and cropped about the centre. For images stored as pixels this only says how large: a
    run chooses among the sizes of its model."""
    image_storage: Literal["latents", "pixels"] = "latents"
    """latents: encoded once, now; to codes if vae is a VQModel. pixels: stored as WebP, resized to cover one
    of image_sizes, and encoded whenever a run reads them; it may then crop and flip them."""
    texts: tuple[Path, ...] = ()
    """Parquet, JSON Lines, text files in UTF-8 with one document per line, folders of these, or patterns."""
    documents: tuple[Path, ...] = ()
    """Files of interleaved documents, folders of them, or patterns. OBELICS: JSON Lines or parquet with two
    lists of equal length, `texts` and `images`; each index holds a text, an image, or both in this order, the
    other null. A third list, `given`, is true for images that are conditions: clean, and without a loss.
    Edits: JSON Lines or parquet with `source` (an image, given), `instruction` and `target`. MMC4: JSON Lines
    with `text_list` and `image_info`."""
    document_images: Path | None = None
    """Tar or folder of the images that documents name; parquet may hold their bytes itself."""
    text_column: str = "text"
    """Key or column of a text."""
    image_column: str = "image"
    """Parquet column of an image's bytes, plain or as Hugging Face's {bytes, path}."""
    caption_column: str = "caption"
    """Parquet column of its caption."""
    augmentation: CopiesConfig | None = None
    """Shifted and scaled copies of each captioned image, so that a small set is not memorized; none by
    default."""
    filters: FilterConfig = FilterConfig()
    """Which records are kept."""
    split: SplitConfig = SplitConfig()
    """Limits beyond which interleaved documents are split."""
    documents_per_shard: int = Field(1024, gt=0)
    """Documents per tar."""
    batch_size: int = Field(64, gt=0)
    """Images encoded at a time."""
    num_workers: int = Field(0, ge=0, le=1024)
    """Worker processes; 0 and 1: this process alone. Changes no byte of a shard."""
    on_error: Literal["fail", "skip"] = "fail"
    """On bad input (an image that does not decode, a caption that is not UTF-8, a corrupt tar): stop the
    command, or skip and count it."""
    max_skip_rate: float = Field(0.01, gt=0, le=1)
    """Maximum fraction of bad inputs; the command stops when it is exceeded by more than chance explains."""
    overwrite: bool = False
    """Whether shards in `out` that were made with other values of these keys may be replaced."""

    @property
    def inputs(self) -> dict[Kind, tuple[Path, ...]]:
        """Input paths by kind."""
        return {"pair": self.images, "text": self.texts, "interleaved": self.documents}

    def warnings(self) -> list[str]:
        """Keys that do nothing, because there is no input of their kind."""
        kinds = [kind for kind, paths in self.inputs.items() if paths]
        used = {
            "tokenizer",
            "vae",
            *KEYS_WITHOUT_EFFECT,
            *(key for kind in kinds for key in KEYS_OF_KIND[kind]),
        }
        idle = sorted(key for key in self.model_fields_set - used if getattr(self, key) not in (None, ()))
        needs = {key: " or ".join(keys[0] for keys in KEYS_OF_KIND.values() if key in keys) for key in idle}
        return [f"warning: {key} has no effect without {needs[key]}" for key in idle]

    @property
    def output_folders(self) -> list[Path]:
        """Folders of shards that may be written, which are never an input."""
        return [self.out / name for name in FOLDERS.values()]

    @model_validator(mode="after")
    def _sizes_differ(self) -> "PreprocessConfig":
        seen: dict[Fraction, Size] = {}
        for size in self.image_sizes:
            other = seen.setdefault(Fraction(*size), size)
            if other is not size:
                raise ValueError(
                    f"image_sizes: {format_sizes([size])} has the aspect ratio of {format_sizes([other])}, "
                    "so no image would go there; remove it"
                )
        return self
