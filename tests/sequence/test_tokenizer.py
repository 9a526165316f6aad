"""The tokenizer: special ids follow those of text; it is saved and loaded; bad files are refused."""

from pathlib import Path

import pytest
import sentencepiece

from megafusion.errors import UserError
from megafusion.sequence.tokenizer import Tokenizer
from megafusion.storage import file_sha256
from tests.support.small import TOKENIZER


def test_special_ids_follow_the_text_ids(tokenizer):
    assert (tokenizer.bos, tokenizer.eos) == (1, 2)
    assert [tokenizer.boi, tokenizer.eoi, tokenizer.vocab_size] == [2046, 2047, 2048]
    assert [tokenizer.boi_of_size(size) for size in range(3)] == [2046, 2048, 2049]
    assert [tokenizer.num_ids(num_sizes) for num_sizes in (1, 3)] == [2048, 2050]


def test_text_comes_back_without_special_ids(tokenizer):
    ids = tokenizer.encode("red apple, 3d style")
    around = [tokenizer.bos, tokenizer.boi, *ids, tokenizer.eoi, tokenizer.boi_of_size(2), tokenizer.eos]
    assert tokenizer.decode(around) == "red apple, 3d style"


def test_a_saved_tokenizer_is_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = Tokenizer.from_pretrained(tmp_path)
    assert again.hash == tokenizer.hash == file_sha256(TOKENIZER)
    assert (tmp_path / "tokenizer.model").read_bytes() == TOKENIZER.read_bytes()


def test_a_missing_or_foreign_file_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"none\.model: no such tokenizer"):
        Tokenizer.from_pretrained(tmp_path / "none.model")
    (tmp_path / "other.model").write_bytes(b"other")
    with pytest.raises(UserError, match=r"other\.model: not a SentencePiece model"):
        Tokenizer.from_pretrained(tmp_path / "other.model")


def test_a_model_without_bos_is_refused(tmp_path: Path):
    (tmp_path / "text").write_text("a b c\n" * 9)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "m"), vocab_size=7, bos_id=-1, minloglevel=2
    )
    with pytest.raises(UserError, match=r"m\.model: has no bos or eos token"):
        Tokenizer.from_pretrained(tmp_path / "m.model")
