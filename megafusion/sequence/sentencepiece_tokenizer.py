"""Tokenizers of SentencePiece, such as Llama 2's."""

from pathlib import Path

import sentencepiece

from megafusion.errors import UserError
from megafusion.sequence.tokenizer import Tokenizer
from megafusion.storage import file_sha256


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model, used unchanged; image ids follow its pieces."""

    file_name = "tokenizer.model"

    def __init__(self, path: Path):
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
        except RuntimeError as error:
            raise UserError(f"{path}: not a SentencePiece model") from error
        ids = self._model.vocab_size(), self._model.bos_id(), self._model.eos_id()
        super().__init__(path, file_sha256(path), *ids)

    def transformers_config(self) -> dict:
        names = ("bos", "eos", "unk")
        tokens = {f"{n}_token": self._model.id_to_piece(getattr(self._model, f"{n}_id")()) for n in names}
        return {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": False, **tokens}

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text)

    def decode_text(self, ids: list[int]) -> str:
        return self._model.decode(ids)
