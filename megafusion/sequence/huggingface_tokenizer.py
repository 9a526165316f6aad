"""Tokenizers of Hugging Face's `tokenizers` library, such as GPT-2's, Llama 3's and Qwen's."""

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import tokenizers

from megafusion.errors import UserError
from megafusion.sequence.tokenizer import Tokenizer
from megafusion.storage import file_sha256, read_json

CONFIGS = ("tokenizer_config.json", "special_tokens_map.json")
"""Files beside a tokenizer.json that may name its bos and eos; the first that does decides."""
END = "<|endoftext|>"
BOS, EOS = (
    ("<|begin_of_text|>", "<s>", "<bos>", "[BOS]", END),
    (END, "<|end_of_text|>", "</s>", "<eos>", "[EOS]"),
)
"""The usual names, for a tokenizer whose files name none: the first that it has as a special token."""
RESERVED = re.compile(
    r"[<\[]\|?(reserved_special_token|reserved|unused|placeholder|SPECIAL|control)_?\d+\|?[>\]]"
)
"""Special tokens that no text needs, such as Llama 3's <|reserved_special_token_0|>."""


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json. Texts get the ids that `tokenizers` gives them, without those that its template adds.

    bos and eos: see CONFIGS, BOS and EOS. Where there is no bos (Qwen, GPT-2), <|endoftext|> begins documents
    as it ends them in the text that such models were trained on; a tokenizer without that one has eos twice.
    """

    file_name = "tokenizer.json"

    def __init__(self, path: Path):
        try:
            self._model = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more specific
            raise UserError(
                f"{path}: tokenizers {tokenizers.__version__} does not read it ({error}); give a "
                "tokenizer.json that it or transformers has saved"
            ) from error
        # Limits of a model's inputs, which some files hold: here streams cut and pack.
        self._model.no_truncation()
        self._model.no_padding()
        added = self._model.get_added_tokens_decoder()
        special = {token.content: i for i, token in added.items() if token.special}
        eos = self._find(path, "eos_token", EOS, special)
        if eos is None:
            raise UserError(
                f"{path}: has no end-of-text token; name one of its tokens in a tokenizer_config.json "
                'beside it: {"eos_token": "..."}'
            )
        bos = self._find(path, "bos_token", BOS, special)
        reserved = sorted(i for content, i in special.items() if RESERVED.fullmatch(content))
        num_ids = 1 + max(self._model.get_vocab().values())
        super().__init__(path, file_sha256(path), num_ids, eos if bos is None else bos, eos, reserved)

    def transformers_config(self) -> dict:
        tokens = {f"{name}_token": self._model.id_to_token(getattr(self, name)) for name in ("bos", "eos")}
        return {"tokenizer_class": "PreTrainedTokenizerFast", **tokens}

    def encode(self, text: str) -> list[int]:
        ids = self._model.encode(text, add_special_tokens=False).ids
        if set(self.reserved).isdisjoint(ids):
            return ids
        self._copy.encode_special_tokens = True  # the name of a reserved token is plain text; never pickled
        return self._copy.encode(text, add_special_tokens=False).ids

    def decode_text(self, ids: list[int]) -> str:
        return self._model.decode(ids)

    @cached_property
    def _copy(self) -> tokenizers.Tokenizer:
        return tokenizers.Tokenizer.from_str(self._model.to_str())

    def _find(self, path: Path, key: str, names: Sequence[str], special: dict[str, int]) -> int | None:
        """The id of bos or eos; None if neither a file beside the tokenizer nor a usual name tells it."""
        for config in map(path.with_name, CONFIGS):
            token = read_json(config, "fix or remove it").get(key) if config.is_file() else None
            token = token.get("content") if isinstance(token, dict) else token
            if token is not None:
                if (found := self._model.token_to_id(str(token))) is None:
                    raise UserError(f"{config}: {key} {token!r} is not in {path}; name one of its tokens")
                return found
        return next((special[name] for name in names if name in special), None)
