"""Training of a tokenizer on captions and texts: SentencePiece with Llama's settings."""

import io
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain
from typing import Any

import sentencepiece

from data_prep.config import PreprocessConfig
from data_prep.filters import plain_key, read_keys
from data_prep.images import clean_input, decode_caption
from data_prep.plan import check_keys, format_counts
from data_prep.readers.interleaved import NamedImages
from data_prep.readers.records import RawPair
from data_prep.readers.splits import Inputs, open_reader
from data_prep.scan import read_records
from data_prep.tokenizer.config import TokenizerConfig
from megafusion.data.manifest import FOLDERS
from megafusion.errors import UserError
from megafusion.storage import write_file

MAX_LENGTH = 1000
"""Characters of a line; SentencePiece leaves out lines of more than 4,192 bytes."""


class _NoImages(NamedImages):
    def __call__(self, name: str) -> bytes:
        return b""


def train_tokenizer(config: TokenizerConfig) -> str:
    """Train the model and write it; a line about it. The same inputs give the same bytes.

    UserError for bad input, by on_error, for a vocab_size that does not fit, and for a file that exists.
    """
    if config.out.exists():
        raise UserError(
            f"out: {config.out} exists, and shards may need it; choose another path, or delete it"
        )
    left_out: Counter[str] = Counter()
    lines = chain.from_iterable(_lines(name, config, left_out) for name in config.inputs)
    sample = sample_lines(lines, config.max_lines)
    write_file(config.out, train_model(sample, config))
    return (
        f"{config.out}: {config.vocab_size} pieces from {len(sample)} lines (records left out: "
        f"{format_counts(left_out)}); model.vocab_size is {config.vocab_size + 2} with one image size, "
        "one more for each further size"
    )


def _lines(name: str, config: TokenizerConfig, left_out: Counter[str]) -> Iterator[str]:
    """Lines of the texts of an input, cleaned as in preprocessing; what is left out is counted by reason."""
    values = config.inputs[name].model_dump(exclude={"weight"})
    # Readers take their columns from it; nothing is preprocessed.
    inputs = PreprocessConfig(out=config.out, tokenizer=config.out, vae=config.out, **values)
    keys = read_keys(inputs.keys) if inputs.keys else None
    found, is_empty = set(), True
    for kind in FOLDERS:
        selected = keys if kind == "pair" else None
        for split in Inputs(kind, inputs.inputs[kind], (), inputs.text_column, inputs.image_column).splits:
            reader = partial(open_reader, kind, split, inputs, _NoImages(None))
            for record, texts, error in read_records(split, reader, _texts_of, config.on_error, selected):
                found |= {plain_key(record.key)} if selected else set()
                if error:
                    left_out[error.reason] += getattr(error, "num_lost", 1) or 1
                lines = [line for text in texts or () for line in text.splitlines()]
                parts = [line[i : i + MAX_LENGTH] for line in lines for i in range(0, len(line), MAX_LENGTH)]
                is_empty &= not parts
                yield from parts * config.inputs[name].weight
    check_keys(inputs, keys, found)
    if is_empty:
        raise UserError(
            f"inputs.{name}: holds no text; set its images, texts or documents to files with some "
            f"(records left out: {format_counts(left_out)})"
        )


def _texts_of(raw: Any) -> list[str]:
    """Texts of a RawPair, a text, or a document's segments. Raises BadRecord."""
    if isinstance(raw, RawPair):
        return [decode_caption(raw.caption)]
    return [clean_input(text) for text in ([raw] if isinstance(raw, str) else raw) if isinstance(text, str)]


def sample_lines(lines: Iterable[str], max_lines: int) -> list[str]:
    """All lines, or a uniform sample of them (reservoir sampling, with a fixed seed)."""
    generator, kept = random.Random(0), []
    for number, line in enumerate(lines):
        if number < max_lines:
            kept.append(line)
        elif (index := generator.randrange(number + 1)) < max_lines:
            kept[index] = line
    return kept


def train_model(lines: list[str], config: TokenizerConfig) -> bytes:
    """A SentencePiece model. Ids: 0 unk, 1 bos, 2 eos, 3 to 258 the bytes, then pieces; no padding."""
    model = io.BytesIO()
    try:
        # An iterator, because the model would record a file's path.
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type=config.model_type,
            vocab_size=config.vocab_size,
            byte_fallback=True,
            character_coverage=0.99995,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=True,
            allow_whitespace_only_pieces=True,
            split_by_number=config.split_digits,
            split_digits=config.split_digits,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(f"vocab_size {config.vocab_size}: {_explain(str(error), len(lines))}") from error
    return model.getvalue()


def _explain(message: str, num_lines: int) -> str:
    """SentencePiece's reason, and the way out."""
    if found := re.search(r"too high .*<= (\d+)", message):
        return f"{num_lines} lines give {found[1]} pieces at most; set it to that or less, or give more text"
    if found := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return f"special tokens, bytes and characters alone are {found[1]} pieces; set it to that or more"
    return f"SentencePiece cannot train on {num_lines} lines ({message.strip()}); give other texts"
