"""Training of tokenizers on every input format, and what is refused."""

import json
from pathlib import Path

import pyarrow
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from data_prep.tokenizer import train
from data_prep.tokenizer.config import TokenizerConfig
from megafusion.cli import main
from megafusion.config import parse_config
from megafusion.errors import UserError
from megafusion.sequence.tokenizer import Tokenizer
from tests.support.raw import png, write_tar
from tests.support.small import GLOSSES


def texts_file(tmp_path: Path) -> str:
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(GLOSSES.read_text().splitlines()[:300]))
    return str(path)


def train_on(tmp_path: Path, name: str = "t", **values) -> Tokenizer:
    values.setdefault("inputs", {"all": {"texts": [texts_file(tmp_path)]}})
    config = {"out": str(tmp_path / f"{name}.model"), "vocab_size": 400} | values
    train.train_tokenizer(parse_config(TokenizerConfig, config, "test"))
    return Tokenizer.from_pretrained(tmp_path / f"{name}.model")


@pytest.fixture
def lines(monkeypatch) -> list[str]:
    """The lines that a model is trained on."""
    seen: list[str] = []
    model = train.train_model
    monkeypatch.setattr(
        train, "train_model", lambda sample, config: seen.extend(sample) or model(sample, config)
    )
    return seen


@pytest.fixture
def inputs(tmp_path) -> dict:
    """One text or more in each format that preprocessing reads."""
    write_tar(tmp_path / "a.tar", {key: {"png": png(), "txt": f" {key} tar ".encode()} for key in ("x", "y")})
    (tmp_path / "images/deep").mkdir(parents=True)
    (tmp_path / "images/deep/b.png").write_bytes(png())
    (tmp_path / "images/deep/b.txt").write_text("image folder")
    captions = pyarrow.table({"jpg": [png(), png()], "alt": ["parquet one", "parquet two"]})
    parquet.write_table(captions, tmp_path / "c.parquet")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/d.txt").write_text("\ufefftext one\n\ntext two\n")
    (tmp_path / "texts/e.jsonl").write_text(json.dumps({"body": "json one\njson two"}) + "\n")
    parquet.write_table(pyarrow.table({"body": ["table text", "  "]}), tmp_path / "texts/f.parquet")
    document = {"texts": [None, "document text"], "images": ["never/read.png", None]}
    (tmp_path / "g.jsonl").write_text(json.dumps(document))
    return {
        "tar": {"images": [str(tmp_path / "a.tar")], "weight": 2},
        "folder": {"images": [str(tmp_path / "images")]},
        "parquet": {
            "images": [str(tmp_path / "c.parquet")],
            "image_column": "jpg",
            "caption_column": "alt",
        },
        "texts": {"texts": [str(tmp_path / "texts")], "text_column": "body"},
        "documents": {"documents": [str(tmp_path / "g.jsonl")]},
    }


def test_every_format_is_read_and_cleaned(inputs, tmp_path, lines):
    tokenizer = train_on(tmp_path, inputs=inputs, vocab_size=300)
    assert sorted(lines) == sorted(
        ["x tar", "y tar"] * 2
        + ["image folder", "parquet one", "parquet two", "text one", "text two", "json one", "json two"]
        + ["table text", "document text"]
    )
    assert tokenizer.vocab_size == 302
    assert tokenizer.decode(tokenizer.encode("x tar text é")) == "x tar text é"


def test_only_captions_of_the_keys_are_read(inputs, tmp_path, lines):
    (tmp_path / "keys.txt").write_text("y\n")
    inputs["tar"]["keys"] = str(tmp_path / "keys.txt")
    train_on(tmp_path, inputs={"tar": inputs["tar"]}, vocab_size=264)
    assert lines == ["y tar"] * 2
    (tmp_path / "keys.txt").write_text("y\nz\n")
    with pytest.raises(UserError, match=r"keys\.txt: 1 keys are not in any of `images`, the first 'z'"):
        train_on(tmp_path, "other", inputs={"tar": inputs["tar"]}, vocab_size=264)


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_models_of_both_kinds_are_the_same_at_each_training(tmp_path, model_type):
    first, second = (train_on(tmp_path, name, model_type=model_type) for name in "ab")
    assert first.hash == second.hash
    model = sentencepiece.SentencePieceProcessor(model_file=str(first.path))
    assert (model.vocab_size(), model.unk_id(), model.bos_id(), model.eos_id()) == (400, 0, 1, 2)
    scores = {model.get_score(i) for i in range(259, 400)}
    assert all(score == int(score) for score in scores) == (model_type == "bpe")  # ranks, or logarithms
    gloss = GLOSSES.read_text().splitlines()[0]
    assert len(first.encode(gloss)) < len(gloss)


def test_digits_are_tokens_of_their_own_unless_told(tmp_path):
    (tmp_path / "digits.txt").write_text("2026 2026 2026 ab\n" * 50)
    inputs = {"all": {"texts": [str(tmp_path / "digits.txt")]}}
    split, whole = (
        train_on(tmp_path, str(on), inputs=inputs, split_digits=on, vocab_size=267) for on in (True, False)
    )
    assert len(split.encode("2026")) == 5  # and the space before them
    assert len(whole.encode("2026")) < 5


def test_long_lines_are_cut_not_dropped(tmp_path, lines):
    (tmp_path / "long.txt").write_text("日本 語" * 1000)
    train_on(tmp_path, inputs={"all": {"texts": [str(tmp_path / "long.txt")]}}, vocab_size=264)
    assert [len(line) for line in lines] == [1000] * 4
    assert max(len(line.encode()) for line in lines) < 4192


@given(st.integers(1, 30), st.integers(0, 60))
def test_samples_are_of_the_size_asked_and_hold_no_line_twice(max_lines, num_lines):
    sample = train.sample_lines(map(str, range(num_lines)), max_lines)
    assert len(set(sample)) == len(sample) == min(max_lines, num_lines)
    assert sample == train.sample_lines(map(str, range(num_lines)), max_lines)


def test_samples_are_even():
    sample = list(map(int, train.sample_lines(map(str, range(100_000)), 1000)))
    assert 45_000 < sum(sample) / 1000 < 55_000


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_a_vocab_size_that_does_not_fit_the_texts_is_refused_with_one_that_does(tmp_path, model_type):
    def limit(vocab_size: int, message: str) -> int:
        with pytest.raises(UserError, match=rf"^vocab_size {vocab_size}: {message}") as caught:
            train_on(tmp_path, vocab_size=vocab_size, model_type=model_type)
        assert "set it to that or" in str(caught.value)
        assert list(tmp_path.glob("*.model")) == []
        return next(int(word) for word in str(caught.value).split()[2:] if word.isdecimal() and word != "300")

    most = limit(100_000, "300 lines give [0-9]+ pieces at most; set it to that or less, or give more text")
    least = limit(100, "special tokens, bytes and characters alone are [0-9]+ pieces; set it to that or more")
    for number, vocab_size in enumerate((most, least + (model_type == "unigram"))):
        assert (
            train_on(tmp_path, f"m{number}", vocab_size=vocab_size, model_type=model_type).vocab_size
            == vocab_size + 2
        )


def test_bad_input_is_refused_or_counted(tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"one\n\xff\xff\n" + texts_of_glosses())
    inputs = {"all": {"texts": [str(tmp_path / "bad.txt")]}}
    with pytest.raises(
        UserError, match=r"bad\.txt, line 2: not UTF-8; fix or remove it, or set on_error=skip"
    ):
        train_on(tmp_path, inputs=inputs)
    config = {"out": str(tmp_path / "t.model"), "inputs": inputs, "vocab_size": 400, "on_error": "skip"}
    said = train.train_tokenizer(parse_config(TokenizerConfig, config, "test"))
    assert "400 pieces from 301 lines (records left out: 1 x not UTF-8); model.vocab_size is 402" in said


def texts_of_glosses() -> bytes:
    return "\n".join(GLOSSES.read_text().splitlines()[:300]).encode()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"inputs": {"web": {}}}, r"inputs\.web: holds no text; set its images, texts or documents"),
        ({"inputs": {"web": {"texts": ["empty.txt"]}}}, r"inputs\.web: holds no text"),
        ({"inputs": {"web": {"texts": ["none.txt"]}}}, r"none\.txt: no such file"),
        ({"inputs": {"web": {"text": ["a"]}}}, r"unknown key 'inputs\.web\.text'; did you mean .*texts"),
        ({"inputs": {}}, r"inputs"),
        ({"out": "t.json"}, r"out: t\.json does not end in \.model"),
        ({"model_type": "bpe2"}, r"model_type"),
        ({"vocab_size": 0}, r"vocab_size"),
    ],
)
def test_what_cannot_be_trained_is_refused(tmp_path, monkeypatch, values, message):
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("\n \n")
    with pytest.raises(UserError, match=message):
        train_on(tmp_path, **values)
    assert list(tmp_path.glob("*.model")) == []


def test_an_existing_file_is_kept(tmp_path):
    (tmp_path / "t.model").write_text("precious")
    with pytest.raises(UserError, match=r"t\.model exists, and shards may need it; choose another path"):
        train_on(tmp_path)
    assert (tmp_path / "t.model").read_text() == "precious"


def test_the_command(tmp_path, monkeypatch, capsys):
    config = tmp_path / "c.yaml"
    config.write_text(json.dumps({"out": "o/t.model", "inputs": {"a": {"texts": [texts_file(tmp_path)]}}}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["megafusion", "train-tokenizer", str(config), "vocab_size=350"])
    with pytest.raises(SystemExit, match="0"):
        main()
    assert "o/t.model: 350 pieces from 300 lines" in capsys.readouterr().out
    assert Tokenizer.from_pretrained("o/t.model").vocab_size == 352
