"""Train the small default tokenizer: SentencePiece with Llama's settings, on captions and glosses."""

import io
import tarfile
from pathlib import Path
from typing import Annotated

import sentencepiece
import typer

from data_prep.command import run_command
from megafusion.errors import UserError
from megafusion.storage import write_file

VOCABULARY_SIZE = 2046
"""BOI and EOI follow in the model's own vocabulary, which makes 2,048."""

CAPTION_WEIGHT = 10
STARTER_WEIGHT = 100
"""How often a caption counts against a gloss: captions, and most of all those of the starter split,
are what the small models read, so their words should be single pieces."""


def read_captions(pack: Path) -> dict[str, str]:
    """Caption by key, in the order of a webdataset tar."""
    if not pack.is_file():
        raise UserError(f"{pack}: no such file; build it with python -m data_prep.emoji.build")
    with tarfile.open(pack) as archive:
        members = [member for member in archive if member.name.endswith(".txt")]
        return {m.name.removesuffix(".txt"): archive.extractfile(m).read().decode() for m in members}


def read_lines(path: Path) -> list[str]:
    """Lines of a text file that must exist and hold some."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; see the README.md files in data_prep for how each is built")
    lines = path.read_text().splitlines()
    if not lines:
        raise UserError(f"{path}: is empty")
    return lines


def train_tokenizer(sentences: list[str], vocabulary_size: int = VOCABULARY_SIZE) -> bytes:
    """A SentencePiece BPE model; the same sentences give the same bytes.

    Ids: 0 unknown, 1 beginning of text, 2 end of text, 3 to 258 the bytes, then pieces. No padding.
    Raises UserError when the sentences cannot fill the vocabulary.
    """
    model = io.BytesIO()
    try:
        # An iterator, not a file: the model would record the file's path.
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocabulary_size,
            byte_fallback=True,
            character_coverage=0.99995,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=True,
            allow_whitespace_only_pieces=True,
            # Llama splits numbers for arithmetic; here the commonest is in "3d", a word of its own.
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
            f"cannot train {vocabulary_size} pieces on {len(sentences)} lines: {error}; give more text"
        ) from error
    return model.getvalue()


def mean_pieces(tokenizer: sentencepiece.SentencePieceProcessor, texts: list[str]) -> float:
    """Mean number of pieces of a text."""
    return sum(len(ids) for ids in tokenizer.encode(texts)) / len(texts)


app = typer.Typer(add_completion=False)


@app.command()
def train(
    pack: Annotated[Path, typer.Option(help="The emoji pack, for its captions.")],
    keys: Annotated[Path, typer.Option(help="Keys of the starter split, whose captions weigh most.")],
    text: Annotated[Path, typer.Option(help="Text file, one document a line.")],
    out: Annotated[Path, typer.Option(help="SentencePiece model to write.")],
) -> None:
    """Train the tokenizer and print how many pieces a caption and a gloss take."""
    captions, glosses = read_captions(pack), read_lines(text)
    missing = [key for key in read_lines(keys) if key not in captions]
    if missing:
        raise UserError(
            f"{keys}: keys not in {pack}: {missing[:5]}; build both with python -m data_prep.emoji.build"
        )
    starter = [captions[key] for key in read_lines(keys)]
    model = train_tokenizer(list(captions.values()) * CAPTION_WEIGHT + starter * STARTER_WEIGHT + glosses)
    write_file(out, model)
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model)
    for name, texts in (
        ("starter caption", starter),
        ("caption", list(captions.values())),
        ("gloss", glosses),
    ):
        typer.echo(f"{mean_pieces(tokenizer, texts):.2f} pieces a {name}")
    typer.echo(f"{tokenizer.vocab_size()} pieces, {len(model)} bytes")


if __name__ == "__main__":
    run_command(app)
