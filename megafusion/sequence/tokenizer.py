"""Text to ids and back: a SentencePiece model, with begin- and end-of-image after its pieces."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

from megafusion.errors import UserError


class Tokenizer:
    """A SentencePiece model with two ids of our own: `boi` and `eoi`, which wrap each image.

    They follow the model's last piece, so any SentencePiece model (Llama 2's 32,000 pieces, say) can
    be used unchanged; `vocab_size` counts them. Where a model has images of several sizes, those of further
    sizes begin with ids of their own behind `eoi`: see `begin_of_image`.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"{self.path}: no such tokenizer; give the path of a SentencePiece .model file")
        model = self.path.read_bytes()
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise UserError(f"{self.path}: not a SentencePiece model") from error
        self.hash = hashlib.sha256(model).hexdigest()
        self.bos, self.eos = self._pieces.bos_id(), self._pieces.eos_id()
        if min(self.bos, self.eos) < 0:
            raise UserError(f"{self.path}: the model has no bos or eos piece; train it with both")
        self.boi = self._pieces.vocab_size()
        self.eoi = self.boi + 1
        self.vocab_size = self.boi + 2

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without bos and eos."""
        return self._pieces.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; bos, eos, boi and eoi leave no trace."""
        own = {self.bos, self.eos}
        # begin- and end-of-image, of whatever size, follow the pieces
        return self._pieces.decode([int(i) for i in ids if int(i) < self.boi and int(i) not in own])


def begin_of_image(tokenizer: Tokenizer, size: int) -> int:
    """The id before an image of a size, by its index: `boi` for the first, those behind `eoi` for others."""
    return tokenizer.eoi + size if size else tokenizer.boi
