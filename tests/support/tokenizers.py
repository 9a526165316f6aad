"""Small tokenizer.json files built as those of GPT-2, Qwen, Llama 3 and Llama 2 are, trained on glosses."""

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from tests.support.small import GLOSSES

WORDS = Regex(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
END = "<|endoftext|>"


def make_gpt2(folder: Path) -> Path:
    """GPT-2's: bytes, one special token, which is the last of the vocabulary; no file names it."""
    tokenizer = _byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens([END])
    return _save(tokenizer, folder, {"model_max_length": 1024})


def make_qwen(folder: Path) -> Path:
    """Qwen's: NFC, a pattern of words, added tokens that are special and not, no bos, truncation left on."""
    tokenizer = _byte_level(_words())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens([END, "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens(["<tool_call>", "</tool_call>"])
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    return _save(tokenizer, folder, {"bos_token": None, "eos_token": END, "pad_token": END})


def make_llama3(folder: Path, num_reserved: int = 4) -> Path:
    """Llama 3's: a template with bos, and reserved tokens at the end of the vocabulary."""
    tokenizer = _byte_level(_words())
    reserved = [f"<|reserved_special_token_{i}|>" for i in range(num_reserved)]
    tokenizer.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", *reserved])
    bos = ("<|begin_of_text|>", tokenizer.token_to_id("<|begin_of_text|>"))
    template = processors.TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    bos_token = {"__type": "AddedToken", "content": "<|begin_of_text|>", "normalized": False}
    return _save(tokenizer, folder, {"bos_token": bos_token, "eos_token": "<|end_of_text|>"})


def make_llama2(folder: Path) -> Path:
    """Llama 2's: SentencePiece's words, and a token for each byte."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    _train(tokenizer, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab = {token: i for i, token in enumerate([*first, *sorted(tokenizer.get_vocab())])}
    tokenizer.model = models.BPE(
        vocab, [tuple(pair) for pair in merges], byte_fallback=True, fuse_unk=True, unk_token="<unk>"
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(first[:3])
    return _save(tokenizer, folder, {"bos_token": "<s>", "eos_token": "</s>"})


def _byte_level(pre_tokenizer) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    _train(tokenizer, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False))
    return tokenizer


def _words() -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(WORDS, behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])


def _train(tokenizer: Tokenizer, trainer) -> None:
    tokenizer.train_from_iterator(GLOSSES.read_text().splitlines()[:500], trainer)


def _save(tokenizer: Tokenizer, folder: Path, config: dict) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
