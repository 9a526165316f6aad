"""tokenizer.json files: its ids are those of the library; bos, eos, image ids; what is refused."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from megafusion.errors import UserError
from megafusion.sequence.tokenizer import Tokenizer
from megafusion.storage import file_sha256
from tests.support.small import TOKENIZER
from tests.support.tokenizers import make_gpt2, make_llama2, make_llama3, make_qwen

MAKERS = {"gpt2": make_gpt2, "qwen": make_qwen, "llama3": make_llama3, "llama2": make_llama2}
TEXTS = st.text() | st.lists(
    st.sampled_from(
        ["a gloss; of words", " ", "\n\n", "é", "e\u0301", "日本", "😀", "'s 12", "<|endoftext|>"]
    )
    | st.sampled_from(["<|im_start|>", "<tool_call>", "</s>", "<|begin_of_text|>", "<0x41>", "▁"])
).map("".join)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return {name: make(tmp_path_factory.mktemp(name)) for name, make in MAKERS.items()}


@pytest.fixture(scope="module", params=MAKERS)
def pair(request, folders) -> tuple[Tokenizer, tokenizers.Tokenizer]:
    """Our tokenizer, and the library's own, without the limits that Qwen's file holds."""
    library = tokenizers.Tokenizer.from_file(str(folders[request.param] / "tokenizer.json"))
    library.no_truncation()
    library.no_padding()
    return Tokenizer.from_pretrained(folders[request.param]), library


@given(text=TEXTS)
def test_ids_are_those_of_the_library(pair, text):
    ours, library = pair
    ids = library.encode(text, add_special_tokens=False).ids
    assert ours.encode(text) == ids
    special = [ours.bos, ours.boi, ours.eoi, *(ours.boi_of_size(size) for size in range(9)), ours.eos]
    assert ours.decode([*special, *ids, *special]) == library.decode(ids)
    assert not {ours.boi, ours.eoi} & set(ids)


def test_special_ids(folders):
    found = {name: Tokenizer.from_pretrained(folder) for name, folder in folders.items()}
    ids = {name: (t.bos, t.eos, t.boi, t.eoi, t.vocab_size) for name, t in found.items()}
    assert ids["gpt2"] == (600, 600, 601, 602, 603)
    assert ids["qwen"] == (600, 600, 605, 606, 607)
    assert ids["llama3"] == (600, 601, 602, 603, 606)
    assert ids["llama2"][:2] == (1, 2)
    qwen, llama = found["qwen"], found["llama3"]
    assert [qwen.boi_of_size(size) for size in range(3)] == [605, 607, 608]
    assert [qwen.num_ids(num_sizes) for num_sizes in (1, 3)] == [607, 609]
    # Four reserved ids, then new ones behind the vocabulary.
    assert [llama.boi_of_size(size) for size in range(5)] == [602, 604, 605, 606, 607]
    assert [llama.num_ids(num_sizes) for num_sizes in (1, 3, 4, 5)] == [606, 606, 607, 608]


def test_the_name_of_a_reserved_token_is_text(folders):
    tokenizer = Tokenizer.from_pretrained(folders["llama3"])
    text = "a <|reserved_special_token_0|> of <|reserved_special_token_3|>"
    assert max(tokenizer.encode(text)) < 600
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert pickle.loads(pickle.dumps(tokenizer)).encode(text) == tokenizer.encode(text)


def test_a_saved_tokenizer_is_the_same(folders, tmp_path):
    for name, folder in folders.items():
        (folder / "chat_template.jinja").write_text("{{ x }}")
        (folder / "other.txt").write_text("")
        tokenizer = Tokenizer.from_pretrained(folder)
        (out := tmp_path / name).mkdir()
        tokenizer.save_pretrained(out)
        again = Tokenizer.from_pretrained(out)
        assert again.hash == tokenizer.hash == file_sha256(folder / "tokenizer.json")
        assert (again.bos, again.eos, again.boi) == (tokenizer.bos, tokenizer.eos, tokenizer.boi)
        names = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
        assert {path.name for path in out.iterdir()} == names


def with_config(folder: Path, out: Path, config: object, name: str = "tokenizer_config.json") -> Tokenizer:
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    shutil.copy(folder / "tokenizer.json", out)
    (out / name).write_text(config if isinstance(config, str) else json.dumps(config))
    return Tokenizer.from_pretrained(out)


def test_bos_and_eos_are_those_of_the_files_beside_it(folders, tmp_path):
    qwen, llama = folders["qwen"], folders["llama3"]
    chat = with_config(qwen, tmp_path / "t", {"bos_token": None, "eos_token": "<|im_end|>"})
    assert (chat.bos, chat.eos) == (600, 602)
    chat = with_config(qwen, tmp_path / "t", {"eos_token": "<|im_end|>"}, "special_tokens_map.json")
    assert (chat.bos, chat.eos) == (600, 602)
    plain = with_config(llama, tmp_path / "t", {})
    assert (plain.bos, plain.eos) == (600, 601)
    mapped = with_config(llama, tmp_path / "t", {"bos_token": {"content": "<|end_of_text|>"}})
    assert (mapped.bos, mapped.eos) == (601, 601)
    with pytest.raises(
        UserError, match=r"tokenizer_config\.json: eos_token '<\|eot\|>' is not in .*json; name"
    ):
        with_config(llama, tmp_path / "t", {"eos_token": "<|eot|>"})
    for config in ("{", "[1]"):
        with pytest.raises(UserError, match=r"tokenizer_config\.json: .* JSON.*; fix or remove it"):
            with_config(llama, tmp_path / "t", config)


def test_a_tokenizer_without_an_end_of_text_is_refused(tmp_path):
    library = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "</s>": 1}, []))
    library.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r'has no end-of-text token; name .* \{"eos_token": "\.\.\."\}'):
        Tokenizer.from_pretrained(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    found = Tokenizer.from_pretrained(tmp_path / "tokenizer.json")
    assert (found.bos, found.eos) == (1, 1)  # no bos: eos begins documents too
    assert found.decode([1, 0, 1]) == "a"  # though the library does not take it for special


@pytest.mark.parametrize("content", ["", "{}", '{"model": {"type": "New"}}', "\x00" * 9])
def test_a_file_that_the_library_refuses(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(
        UserError, match=r"tokenizer\.json: tokenizers 0\.\S+ does not read it \(.+\); give a"
    ):
        Tokenizer.from_pretrained(tmp_path)


def test_folders_with_both_files_or_none_are_refused(folders, tmp_path):
    with pytest.raises(UserError, match=r"holds no tokenizer\.model or tokenizer\.json; give"):
        Tokenizer.from_pretrained(tmp_path)
    shutil.copy(TOKENIZER, tmp_path)
    assert Tokenizer.from_pretrained(tmp_path).vocab_size == 2048
    shutil.copy(folders["gpt2"] / "tokenizer.json", tmp_path)
    with pytest.raises(UserError, match=r"holds tokenizer\.model and tokenizer\.json; give the path of one"):
        Tokenizer.from_pretrained(tmp_path)
    assert Tokenizer.from_pretrained(tmp_path / "tokenizer.json").vocab_size == 603
