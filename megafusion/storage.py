"""Files and folders that appear whole or not at all."""

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from megafusion.errors import UserError, refuse_os_errors


def file_sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_sha256(folder: Path, suffixes: Collection[str] = ()) -> str:
    """Hex digest of the names and contents of a folder's files.

    suffixes: of the files that count, all by default. Hidden files and compiled Python never do.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        hidden = any(part.startswith(".") or part == "__pycache__" for part in name.parts)
        if path.is_file() and not hidden and (not suffixes or path.suffix in suffixes):
            digest.update(f"{name.as_posix()} {file_sha256(path)}\n".encode())
    return digest.hexdigest()


def expand_path(path: str | Path) -> str:
    """The path with ~, ~user, $NAME and ${NAME} replaced. UserError if there is no such user or variable.

    A $ in the name of a file or folder that exists is no variable. UserError for a URL, too.
    """
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(path)):
        raise UserError(f"{path}: is a URL, where a path on a disk is needed; copy it there")
    expanded = os.path.expanduser(path)  # noqa: PTH111 - Path's would drop a slash at the end
    before, dollar, rest = expanded.partition("$")
    is_name = dollar and os.path.lexists(f"{before}${rest.partition('/')[0]}")
    expanded = expanded if is_name else os.path.expandvars(expanded)
    unknown = None if is_name else re.search(r"\$(\w+|{\w*})", expanded)
    if unknown := re.match(r"~[^/]*", expanded) or unknown:
        raise UserError(f"{path}: {unknown[0]} is not known here; write the path out")
    return expanded


def read_text(path: Path) -> str:
    """Text of a file that a user wrote, without a byte order mark. UserError where it is not UTF-8."""
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 from byte {error.start} on; save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"{path}: {(error.strerror or str(error)).lower()}") from error


def read_json(path: Path, way_out: str = "") -> dict[str, Any]:
    """The object in a JSON file. UserError for anything else; way_out: advice to the user."""
    advice = f"; {way_out}" if way_out else ""
    try:
        values = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}){advice}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: is not a JSON object{advice}")
    return values


def read_lines(path: Path) -> list[str]:
    """Lines of a user's file, stripped; empty ones are skipped. UserError where there are none."""
    lines = [line for raw in read_text(path).split("\n") if (line := raw.strip())]
    if not lines:
        raise UserError(f"{path}: is empty")
    return lines


def write_file(path: Path, content: bytes | str) -> None:
    """Write a whole file or nothing: a reader never sees a part of it. Makes the folder if needed.

    Who may read it is for the umask to say, as with any file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")  # tempfile's would ignore the umask
    try:
        with temporary.open("xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def refuse_existing(folder: Path, overwrite: bool) -> None:
    """UserError for a folder that holds something, unless it is to be replaced."""
    if not overwrite and folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder}: exists; name another folder, or replace it with --overwrite")


@contextmanager
def new_folder(folder: Path, marker: str) -> Iterator[Path]:
    """A folder to fill, which takes its place when the block ends well, and is gone otherwise.

    An older folder of that name is replaced if it is of the same kind, which its file `marker` shows.
    Raises UserError where it holds anything else, or when the disk is full.
    """
    refuse_foreign(folder, marker)
    partial, old = (folder.with_name(folder.name + ending) for ending in (".partial", ".old.partial"))
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with refuse_os_errors(f"{folder}: cannot be written", "; free space or choose another folder"):
            partial.mkdir(parents=True)
            yield partial
            # Renamed, not deleted: what a kill leaves of it would be taken for another's.
            if folder.exists():
                shutil.rmtree(old, ignore_errors=True)
                folder.rename(old)
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
        elif old.exists():
            old.rename(folder)


def refuse_foreign(folder: Path, marker: str, beside: tuple[str, ...] = ()) -> None:
    """UserError where a folder to be replaced holds something that is not ours to delete.

    beside: names, or patterns of names, that may stand there without the marker.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; name a folder")
    entries = folder.iterdir() if folder.exists() else ()
    others = any(not any(fnmatch(entry.name, pattern) for pattern in beside) for entry in entries)
    if others and not (folder / marker).is_file():
        raise UserError(f"{folder}: holds other files, which would be lost; choose another folder")
