"""The tokenizer interface: text to token ids and back, with special ids that begin and end images."""

import shutil
from collections.abc import Iterable
from pathlib import Path

from megafusion.errors import UserError


class Tokenizer:
    """Text to token ids and back. `from_pretrained` chooses the subclass that reads a file.

    The ids from `num_text_ids` on are special: `boi` (begin of image), `eoi` (end of image), then a boi for
    each further image size. bos and eos are the file's own.
    vocab_size: text ids, boi and eoi. hash: sha256 of the file, by which shards name their tokenizer.
    """

    file_name: str
    """Name of the file in the folders that `save_pretrained` writes."""

    def __init__(self, path: Path, file_hash: str, num_text_ids: int, bos: int, eos: int):
        if min(bos, eos) < 0:
            raise UserError(f"{path}: has no bos or eos token; give a tokenizer that was trained with both")
        self.path, self.hash, self.bos, self.eos = path, file_hash, bos, eos
        self.boi, self.eoi, self.vocab_size = num_text_ids, num_text_ids + 1, num_text_ids + 2

    @staticmethod
    def from_pretrained(path: Path | str) -> "Tokenizer":
        """Load a tokenizer file, or the one of a folder that `save_pretrained` wrote."""
        from megafusion.sequence.sentencepiece_tokenizer import SentencePieceTokenizer

        path = Path(path)
        if (path / "tokenizer.json").is_file() and not (path / SentencePieceTokenizer.file_name).is_file():
            raise UserError(
                f"{path}: has a tokenizer.json, which is not read yet; add SentencePiece's tokenizer.model"
            )
        return SentencePieceTokenizer(path / SentencePieceTokenizer.file_name if path.is_dir() else path)

    def save_pretrained(self, folder: Path | str) -> None:
        """Copy the tokenizer's file into a folder."""
        shutil.copyfile(self.path, Path(folder) / self.file_name)

    def transformers_config(self) -> dict:
        """tokenizer_config.json with which transformers loads the file."""
        raise NotImplementedError

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without bos and eos."""
        raise NotImplementedError

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; bos, eos and the special ids are dropped."""
        text_ids = (int(i) for i in ids if int(i) < self.boi)
        return self.decode_text([i for i in text_ids if i not in (self.bos, self.eos)])

    def decode_text(self, ids: list[int]) -> str:
        """Text of ids that are all of text."""
        raise NotImplementedError

    def boi_of_size(self, size: int) -> int:
        """The id that begins an image of a size, by index: `boi` for the first, then ids after `eoi`."""
        return self.eoi + size if size else self.boi

    def num_ids(self, num_image_sizes: int) -> int:
        """Ids of text and special ids of a model with so many image sizes."""
        return self.vocab_size + num_image_sizes - 1
