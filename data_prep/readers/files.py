"""The files of the inputs: those of known forms are read, by their content, and the others are counted."""

import fnmatch
import glob
import json
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Literal

from braceexpand import braceexpand

from megafusion.data.manifest import FOLDERS, MANIFEST, Kind
from megafusion.data.shards import INDEX
from megafusion.errors import UserError

IMAGE_SUFFIXES = {"webp", "png", "jpg", "jpeg", "jpe", "jfif", "gif", "bmp", "tif", "tiff", "avif"}
Form = Literal["parquet", "tar", "jsonl", "lines", "image"]
FORMS: dict[Kind, tuple[Form, ...]] = {
    "pair": ("tar", "parquet", "image"),
    "text": ("parquet", "jsonl", "lines"),
    "interleaved": ("parquet", "jsonl"),
}
FORM_OF_SUFFIX: dict[str, Form] = {
    **{".parquet": "parquet", ".tar": "tar", ".jsonl": "jsonl", ".ndjson": "jsonl", ".txt": "lines"},
    **{f".{suffix}": "image" for suffix in IMAGE_SUFFIXES},
}
LEFTOVER_SUFFIXES = {".part", ".partial", ".crdownload", ".download", ".incomplete", ".aria2"}
LEFTOVER_SUFFIXES |= {".bak", ".backup", ".orig", ".old", ".tmp", ".temp", ".swp", ".lock"}
"""Of downloads that have not ended, and of backups, which would be read twice."""
COMPRESSED_SUFFIXES = {".gz", ".tgz", ".zip", ".bz2", ".xz", ".zst"}
MAGIC: dict[str, re.Pattern[bytes]] = {
    form: re.compile(pattern, re.DOTALL)
    for form, pattern in {
        "parquet": rb"PAR1",
        "tar": rb".{257}ustar",
        "compressed": rb"\x1f\x8b|PK\x03\x04|BZh|\xfd7zXZ\0|\x28\xb5\x2f\xfd",
        "image": rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|BM.{4}\0{4}|II[*+]\0|MM\0[*+]|RIFF.{4}WEBP"
        rb"|.{4}ftypavi[fs]",
    }.items()
}
HEAD_BYTES = 512
MAX_LINE_BYTES = 16 << 20
OUTPUTS = {
    "shards, which are the output of preprocessing": (MANIFEST, f"*{INDEX}"),
    "a run": ("config.yaml", "environment.json"),
    "a model": ("config.json", "*model*.safetensors"),
}
"""Names, or patterns of names, of files that show what a folder was made to hold: its images are no input."""
PARTIAL_SHARDS = re.compile(rf"({'|'.join(FOLDERS.values())})\.(\w+\.)?partial")


def expand(path: Path) -> list[tuple[Path, bool]]:
    """A path, or the paths that its braces and wildcards match, in order; and whether each is named.

    A file whose suffix is left to a wildcard is not named, but found as in a folder. UserError for no match.
    """
    if path.exists():
        return [(path, True)]
    found = []
    try:
        patterns = [Path(pattern) for pattern in braceexpand(str(path))]
    except ValueError:  # braces that do not close
        patterns = [path]
    for pattern in patterns:
        matches = sorted(Path(name) for name in glob.glob(str(pattern), recursive=True))  # noqa: PTH207 (may be absolute)
        if not matches or not all(match.exists() for match in matches):
            raise UserError(f"{pattern}: no such file or folder")
        any_file = not pattern.name.strip("*")
        found += [(match, match.suffix == pattern.suffix and not any_file) for match in matches]
    return found


def form_of(path: Path, kind: Kind, is_named: bool, keys: Collection[str]) -> Form | None:
    """How a file of a kind of input is read, by its content where that tells; None where it is not.

    is_named: by the user, not found in a folder. keys: a JSON object with one of them on its first line makes
    a file JSON Lines. Raises UserError for compressed files.
    """
    suffix = path.suffix.lower()
    by_suffix = FORM_OF_SUFFIX.get(suffix)
    if kind == "pair" and by_suffix == "image":
        return "image"  # without opening a million of them
    if not is_named and (suffix in LEFTOVER_SUFFIXES or path.name.endswith("~")):
        return None
    if path.name.startswith("_") and not (by_suffix or is_named):
        return None  # Spark's _metadata is parquet without rows of its own
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); make it readable, or move it") from error
    form: str | None = next((form for form, pattern in MAGIC.items() if pattern.match(head)), None)
    inner_form = FORM_OF_SUFFIX.get(Path(path.stem).suffix.lower())
    says_so = suffix in COMPRESSED_SUFFIXES and (is_named or suffix == ".tgz" or inner_form in FORMS[kind])
    if says_so or (form == "compressed" and by_suffix in ("jsonl", "lines")):
        raise UserError(f"{path}: is compressed, but records are read by their offset; unpack it first")
    if form in (None, "compressed"):
        form = by_suffix
        if by_suffix != "jsonl" and _is_json_lines(path, head, keys):
            form = "jsonl"
        elif is_named and by_suffix not in FORMS[kind] and b"\0" not in head:
            form = "lines" if kind == "text" and suffix != ".json" else "jsonl"
    return next((known for known in FORMS[kind] if known == form), None)


def _is_json_lines(path: Path, head: bytes, keys: Collection[str]) -> bool:
    """Whether the first line is a JSON object with one of some keys."""
    if not (start := head.removeprefix(b"\xef\xbb\xbf").lstrip()).startswith(b"{"):
        return False
    with path.open("rb") as file:
        file.seek(len(head) - len(start))
        try:
            value = json.loads(file.readline(MAX_LINE_BYTES))
        except (ValueError, RecursionError):
            return False
    return not value.keys().isdisjoint(keys)


def walk(folder: Path, own: Collection[str], seen: dict[str, Path]) -> Iterator[tuple[Path, str | None]]:
    """Every file below a folder, also through linked folders; and why it is ignored, where it is.

    own: real paths of folders that the command writes, which it does not read. seen: folders by their real
    paths. Raises UserError for a folder that is reached twice, as by a link to one that holds it.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror}); make it readable, or move it")

    for name, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        here = Path(name)
        if output := _output_in(files):
            if here == folder:
                raise UserError(f"{folder}: holds {output}; name its inputs")
            folders.clear()
            yield here, "folder of outputs"
            continue
        other = seen.setdefault(os.path.realpath(here), here)
        if other is not here:
            raise UserError(
                f"{here}: is the same folder as {other}, by a link or named twice; remove one of them"
            )
        for child in list(folders):
            if child.startswith("."):
                folders.remove(child)
                yield here / child, "hidden"
            elif PARTIAL_SHARDS.fullmatch(child) or os.path.realpath(here / child) in own:
                folders.remove(child)
                yield here / child, "folder of outputs"
        for file in files:
            path = here / file
            if file.startswith("."):
                yield path, "hidden"
            else:
                yield path, None if path.is_file() else "neither a file nor a folder"


def _output_in(files: Collection[str]) -> str | None:
    """The kind of output that a folder with such files holds, if a command made it; else None."""
    found = (w for w, names in OUTPUTS.items() if all(fnmatch.filter(files, name) for name in names))
    return next(found, None)
