"""Where pictures, captions and text come from, what is kept of them, and where shards go."""

from fractions import Fraction
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from megafusion.config import Config
from megafusion.images.sizes import Size, say_sizes

Pixels = Annotated[int, Field(gt=0)]
BYTES_ALIKE = {"out", "num_workers", "max_skip_rate"}
"""Keys of PreprocessConfig that change nothing in the shards."""


class ScoreRange(Config):
    """What a score must be."""

    least: float = float("-1e308")
    """Pictures below are dropped."""
    most: float = float("1e308")
    """Pictures above are dropped."""


class FilterConfig(Config):
    """What is kept. What is dropped is counted by reason, and is no error."""

    min_side: int = Field(1, gt=0)
    """Least pixels of a picture's shorter side."""
    max_aspect: float | None = Field(None, ge=1)
    """Most that the longer side may be of the shorter one."""
    min_caption: int = Field(1, gt=0)
    """Least characters of a caption."""
    max_caption: int | None = Field(None, gt=0)
    """Most characters of a caption."""
    duplicates: Literal["keep", "exact", "perceptual"] = "keep"
    """Of what comes again, only the first stays. exact: the same bytes of a picture, the same text;
    perceptual: also pictures of pairs that look alike (pHash, which sees shapes and no colours)."""
    max_distance: int = Field(0, ge=0, le=4)
    """Most bits in which the 64-bit pHashes of pictures that look alike differ."""
    scores: dict[str, ScoreRange] = Field({})
    """By name, in a picture's .json or a parquet column: an aesthetic or safety score, say."""


class SplitConfig(Config):
    """Where interleaved documents are split, between parts and within texts, so that each fits in a row."""

    tokens: int = Field(2048, gt=0)
    """Most text tokens of a document with images."""
    images: int = Field(4, gt=0)
    """Most images of a document."""


class PreprocessConfig(Config):
    """Where pictures, captions and text come from, what is kept of them, and where shards go."""

    renamed_keys: ClassVar[dict[str, str]] = {
        "image_size": "image_sizes",
        "more_image_sizes": "image_sizes",
    }

    out: Path
    """Folder that receives one folder of shards a kind: pairs/, text/ and interleaved/."""
    tokenizer: Path
    """SentencePiece model."""
    vae: Path
    """diffusers AutoencoderKL folder."""
    pictures: tuple[Path, ...] = ()
    """webdataset tars with a picture and a .txt caption a key (img2dataset's output), parquet files of both,
    folders of these or of pictures with .txt files beside them."""
    keys: Path | None = None
    """File that names the keys of pictures to keep, one a line; all of them by default."""
    image_sizes: tuple[tuple[Pixels, Pixels], ...] = Field(((64, 64),), min_length=1)
    """Heights and widths in pixels. Each image goes to the size whose aspect ratio is nearest to its own, is
    resized to cover it and cropped about the centre. For images stored as pixels this only says how large: a
    run chooses among the sizes of its model."""
    images: Literal["latents", "pictures"] = "latents"
    """latents: encoded now, once. pictures: kept as WebP, resized to cover one of image_sizes, and encoded by
    a run whenever it shows them; it may then crop and mirror them."""
    texts: tuple[Path, ...] = ()
    """Files of text, or folders of them: .parquet, .jsonl, and others in UTF-8 with one document a line."""
    documents: tuple[Path, ...] = ()
    """Files of interleaved documents, or folders of them. As OBELICS has them: .jsonl or .parquet with two
    lists of one length, `texts` and `images`; at each place stands a text, an image, or both in this order,
    the other null. As MMC4 has them: .jsonl with `text_list` and `image_info`."""
    document_pictures: Path | None = None
    """Tar or folder that holds the images which documents name; parquet may hold their bytes itself."""
    text_column: str = "text"
    """Key or column of a text."""
    picture_column: str = "image"
    """Column of a picture's bytes in parquet, plain or as Hugging Face's {bytes, path}."""
    caption_column: str = "caption"
    """Column of its caption."""
    filters: FilterConfig = FilterConfig()
    """What is kept."""
    split: SplitConfig = SplitConfig()
    """Where interleaved documents are split."""
    documents_per_shard: int = Field(1024, gt=0)
    """Documents in each tar."""
    batch_size: int = Field(64, gt=0)
    """Pictures encoded at a time."""
    num_workers: int = Field(0, ge=0)
    """Processes that work side by side; 0 and 1: this one alone. Changes no byte of a shard."""
    on_error: Literal["fail", "skip"] = "fail"
    """What an input that is bad does (a picture that does not decode, a caption that is no UTF-8, a damaged
    tar): stop the command, or be counted and left out."""
    max_skip_rate: float = Field(0.01, gt=0, le=1)
    """Share of bad inputs beyond which, by more than chance brings, the command stops all the same."""

    @model_validator(mode="after")
    def _sizes_differ(self) -> "PreprocessConfig":
        seen: dict[Fraction, Size] = {}
        for size in self.image_sizes:
            other = seen.setdefault(Fraction(*size), size)
            if other is not size:
                raise ValueError(
                    f"image_sizes: {say_sizes([size])} has the aspect ratio of {say_sizes([other])}, so no "
                    "image would go there; remove it"
                )
        return self
