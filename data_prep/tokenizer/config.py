"""Configuration of a tokenizer's training: its texts, and what is trained."""

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from megafusion.config import Config


class TokenizerInput(Config):
    """Captions and texts, named and read as in preprocessing."""

    images: tuple[Path, ...] = ()
    """Captioned images: webdataset tars, parquet files, folders of these or of images with .txt files."""
    keys: Path | None = None
    """File of the keys of images whose captions are taken, one per line; all by default."""
    texts: tuple[Path, ...] = ()
    """Text files, or folders of them: .parquet, .jsonl, and others in UTF-8 with one document per line."""
    documents: tuple[Path, ...] = ()
    """Files of interleaved documents, or folders of them; their images are not needed."""
    text_column: str = "text"
    """Key or column of a text."""
    image_column: str = "image"
    """Parquet column of an image."""
    caption_column: str = "caption"
    """Parquet column of its caption."""
    weight: int = Field(1, gt=0)
    """How often each of its texts counts."""


class TokenizerConfig(Config):
    """A SentencePiece model and the texts that it is trained on."""

    out: Path
    """SentencePiece model to write, NAME.model; an existing one is kept."""
    inputs: dict[str, TokenizerInput] = Field(min_length=1)
    """Captions and texts, by a name of your choice."""
    vocab_size: int = Field(gt=0)
    """Pieces: words and parts of words, 256 bytes, unk, bos and eos. boi and eoi come on top in a model."""
    model_type: Literal["bpe", "unigram"] = "bpe"
    """Kind of SentencePiece model: bpe as Llama 2's, or unigram as T5's."""
    split_digits: bool = True
    """Whether each digit is a token, as in Llama 2."""
    max_lines: int = Field(5_000_000, gt=0)
    """Lines of text to train on, sampled evenly where there are more; three million take about a GB."""
    on_error: Literal["fail", "skip"] = "fail"
    """On bad input (a caption that is not UTF-8, a corrupt tar): stop the command, or skip and count it."""

    @field_validator("out")
    @classmethod
    def _is_model(cls, out: Path) -> Path:
        if out.suffix != ".model":
            raise ValueError(f"{out} does not end in .model, by which SentencePiece models are known")
        return out
