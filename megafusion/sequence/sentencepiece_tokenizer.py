"""Tokenizers of SentencePiece, such as Llama 2's."""

from pathlib import Path

import sentencepiece

from megafusion.errors import UserError
from megafusion.sequence.tokenizer import Tokenizer
from megafusion.storage import file_sha256


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model, used unchanged."""

    file_name = "tokenizer.model"

    def __init__(self, path: Path):
        if not path.is_file():
            raise UserError(f"{path}: no such tokenizer; give the path of a SentencePiece .model file")
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
        except RuntimeError as error:
            raise UserError(f"{path}: not a SentencePiece model") from error
        ids = self._model.vocab_size(), self._model.bos_id(), self._model.eos_id()
        super().__init__(path, file_sha256(path), *ids)

    def transformers_config(self) -> dict:
        pieces = {name: self._model.id_to_piece(getattr(self, name)) for name in ("bos", "eos")}
        return {
            "tokenizer_class": "LlamaTokenizer",
            "add_bos_token": True,
            "add_eos_token": False,
            "legacy": False,
            "unk_token": self._model.id_to_piece(self._model.unk_id()),
            **{f"{name}_token": piece for name, piece in pieces.items()},
        }

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text)

    def decode_text(self, ids: list[int]) -> str:
        return self._model.decode(ids)
