"""Training of the small default tokenizer: SentencePiece with Llama's settings, on captions and glosses."""

import io
from pathlib import Path
from typing import Annotated

import sentencepiece
import typer

from data_prep.emoji.pack import read_keys, read_pack
from data_prep.images import decode_caption
from megafusion.errors import UserError
from megafusion.resilience.exit_status import exit_on_user_error
from megafusion.storage import read_lines, write_file

VOCABULARY_SIZE = 2046
"""The model's vocabulary adds BOI and EOI, which makes 2,048."""

CAPTION_WEIGHT = 10
STARTER_WEIGHT = 100
"""Repetitions of a caption, and of one of the starter split: small models are trained on captions, so their
words should be single tokens."""


def train_tokenizer(sentences: list[str]) -> bytes:
    """A SentencePiece BPE model; the same sentences give the same bytes.

    Ids: 0 unk, 1 bos, 2 eos, 3 to 258 the bytes, then pieces. No padding. UserError if the sentences
    cannot fill the vocabulary.
    """
    model = io.BytesIO()
    try:
        # An iterator, because the model would record a file's path.
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type="bpe",
            vocab_size=VOCABULARY_SIZE,
            byte_fallback=True,
            character_coverage=0.99995,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=True,
            allow_whitespace_only_pieces=True,
            # Llama splits numbers for arithmetic; here the most frequent number is in "3d", which is a word.
            split_by_number=False,
            split_digits=False,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(
            f"cannot train {VOCABULARY_SIZE} pieces on {len(sentences)} lines: {error}; give more text"
        ) from error
    return model.getvalue()


def mean_tokens(tokenizer: sentencepiece.SentencePieceProcessor, texts: list[str]) -> float:
    """Mean number of tokens of a text."""
    return sum(len(ids) for ids in tokenizer.encode(texts)) / len(texts)


def train(
    pack: Annotated[Path, typer.Option(help="The emoji pack, for its captions.")],
    keys: Annotated[Path, typer.Option(help="Keys of the starter split, whose captions are repeated most.")],
    text: Annotated[Path, typer.Option(help="Text file, one document per line.")],
    out: Annotated[Path, typer.Option(help="SentencePiece model to write.")],
) -> None:
    """Train the tokenizer and print the mean number of tokens of a caption and a gloss."""
    glosses = read_lines(text)
    captions = {key: decode_caption(pair.caption) for key, pair in read_pack(pack).items()}
    starter = [captions[key] for key in read_keys(keys, captions)]
    model = train_tokenizer(list(captions.values()) * CAPTION_WEIGHT + starter * STARTER_WEIGHT + glosses)
    write_file(out, model)
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model)
    texts = {"starter caption": starter, "caption": list(captions.values()), "gloss": glosses}
    for name, some in texts.items():
        typer.echo(f"{mean_tokens(tokenizer, some):.2f} tokens per {name}")
    typer.echo(f"{tokenizer.vocab_size()} pieces, {len(model)} bytes")


if __name__ == "__main__":
    with exit_on_user_error():
        typer.run(train)
