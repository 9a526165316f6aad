"""The tokenizer interface: text to token ids and back, with special ids that begin and end images."""

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from megafusion.errors import UserError
from megafusion.storage import expand_path

FILE_NAMES = ("tokenizer.model", "tokenizer.json")
COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
"""Files beside a tokenizer that are saved with it, where there are any."""


class Tokenizer:
    """Text to token ids and back. `from_pretrained` chooses the subclass that reads a file.

    num_text_ids: the file's ids, among them bos, eos and `reserved`, which no text needs. The image ids are
    `boi` (begin of image), `eoi` (end of image), then a boi for each further image size: they take the
    reserved ids, then new ones from num_text_ids on.
    vocab_size: the file's ids, boi and eoi; a model may have more (a padded vocabulary).
    hash: sha256 of the file, by which shards name their tokenizer.
    """

    file_name: str
    """Name of the file in the folders that `save_pretrained` writes, one of FILE_NAMES."""

    def __init__(
        self, path: Path, file_hash: str, num_text_ids: int, bos: int, eos: int, reserved: Sequence[int] = ()
    ):
        if min(bos, eos) < 0:
            raise UserError(f"{path}: has no bos or eos token; give a tokenizer that was trained with both")
        self.path, self.hash, self.bos, self.eos = path, file_hash, bos, eos
        self.num_text_ids, self.reserved = num_text_ids, tuple(reserved)
        self.boi, self.eoi = self._image_id(0), self._image_id(1)
        self.vocab_size = self.num_ids(1)

    @staticmethod
    def from_pretrained(path: Path | str) -> "Tokenizer":
        """Load a SentencePiece model, a tokenizer.json, or the one of them that a folder holds."""
        path = Path(expand_path(path))
        if path.is_dir():
            match [path / name for name in FILE_NAMES if (path / name).is_file()]:
                case [found]:
                    path = found
                case []:
                    raise UserError(
                        f"{path}: holds no {' or '.join(FILE_NAMES)}; give the path of a tokenizer, or have "
                        "transformers' save_pretrained write a tokenizer.json from its older files"
                    )
                case _:
                    raise UserError(f"{path}: holds {' and '.join(FILE_NAMES)}; give the path of one of them")
        if not path.is_file():
            raise UserError(
                f"{path}: no such tokenizer; give a SentencePiece .model file or a tokenizer.json"
            )
        if path.suffix == ".json":
            from megafusion.sequence.huggingface_tokenizer import HuggingFaceTokenizer

            return HuggingFaceTokenizer(path)
        from megafusion.sequence.sentencepiece_tokenizer import SentencePieceTokenizer

        return SentencePieceTokenizer(path)

    def save_pretrained(self, folder: Path | str) -> None:
        """Copy the tokenizer's file, and those that belong to it, into a folder."""
        shutil.copyfile(self.path, Path(folder) / self.file_name)
        for name in COMPANIONS:
            if (companion := self.path.with_name(name)).is_file():
                shutil.copyfile(companion, Path(folder) / name)

    def transformers_config(self) -> dict:
        """tokenizer_config.json with which transformers loads the file, where there is none beside it."""
        raise NotImplementedError

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without bos and eos; never an image id."""
        raise NotImplementedError

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; bos, eos and image ids are dropped."""
        text_ids = (i for i in map(int, ids) if i < self.num_text_ids)
        return self.decode_text([i for i in text_ids if i not in (self.bos, self.eos)])

    def decode_text(self, ids: list[int]) -> str:
        """Text of ids of the file; the reserved ones are dropped."""
        raise NotImplementedError

    def boi_of_size(self, size: int) -> int:
        """The id that begins an image of a size, by index: `boi` for the first, then ids after `eoi`."""
        return self._image_id(size + 1 if size else 0)

    def image_ids(self, num_image_sizes: int) -> list[int]:
        """The ids that begin and end images of so many sizes."""
        return [self._image_id(index) for index in range(num_image_sizes + 1)]

    def num_ids(self, num_image_sizes: int, codebook_size: int = 0) -> int:
        """Ids of the file, new ones for so many image sizes, and codes: the minimum vocab_size of a model.

        The id of the first code is the number without codes.
        """
        return self.num_text_ids + max(0, num_image_sizes + 1 - len(self.reserved)) + codebook_size

    def _image_id(self, index: int) -> int:
        num_reserved = len(self.reserved)
        return self.reserved[index] if index < num_reserved else self.num_text_ids + index - num_reserved
