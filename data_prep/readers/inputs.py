"""Which files are read, and by what: the pieces that a scan's work is cut into, fixed by the files alone."""

import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from data_prep.config import PreprocessConfig
from data_prep.readers.documents import DocumentLines, DocumentTable, NamedPictures
from data_prep.readers.lines import JsonReader, LineReader, byte_parts
from data_prep.readers.records import Picture, Reader, Record
from data_prep.readers.tables import PictureTable, TextTable, group_parts
from data_prep.readers.tars import IMAGE_SUFFIXES, TarReader, plain_name, scores_of
from megafusion.data.shards import Kind
from megafusion.errors import UserError

PICTURES_A_PIECE = 512
BYTES_A_PIECE = 64 << 20
PACKED = {".gz", ".tgz", ".zip", ".bz2", ".xz", ".zst"}


class InputSplit(NamedTuple):
    """What one process scans at a time: a file, a part of one, or pictures of a folder."""

    number: int
    folder: Path | None
    """The folder whose pictures these are; None: one file of many records."""
    files: tuple[Path, ...]
    part: tuple[int, int] | tuple[()] = ()
    """Of a large file, the bytes in which this piece's lines begin, or its row groups: first and end."""

    @property
    def opens_file(self) -> bool:
        """Whether it is a file's first part, or all of it."""
        return not self.part or self.part[0] == 0


def find_pieces(kind: Kind, config: PreprocessConfig) -> list[InputSplit]:
    """Every piece of a kind's inputs, in order. UserError for a path that is not there."""
    paths = {"pair": config.pictures, "text": config.texts, "interleaved": config.documents}[kind]
    found = []
    for path in paths:
        if path.is_dir():
            found += _of_folder(kind, path)
        elif path.is_file():
            found += _of_file(kind, path)
        else:
            raise UserError(f"{path}: no such file or folder to preprocess")
    return [InputSplit(number, *piece) for number, piece in enumerate(found)]


def open_piece(kind: Kind, piece: InputSplit, config: PreprocessConfig, named: NamedPictures) -> Reader:
    """The reader of a piece. Raises UserError where it cannot be opened as what its name says."""
    if piece.folder:
        return FolderReader(piece)
    (path,) = piece.files
    suffix = path.suffix.lower()
    if suffix in PACKED:
        raise _packed(path)
    if kind == "pair":
        names = (config.picture_column, config.caption_column, list(config.filters.scores))
        return PictureTable(path, *names) if suffix == ".parquet" else TarReader(path)
    if kind == "interleaved":
        return DocumentTable(path, named) if suffix == ".parquet" else DocumentLines(path, named)
    if suffix == ".parquet":
        return TextTable(path, config.text_column)
    return JsonReader(path, config.text_column) if suffix == ".jsonl" else LineReader(path)


def _packed(path: Path) -> UserError:
    return UserError(f"{path}: is compressed, and records are read by their place in a file; unpack it first")


class FolderReader:
    """Pictures of a folder, with a .txt and perhaps a .json beside each. A record's place: its number."""

    def __init__(self, piece: InputSplit):
        self._piece = piece

    def records(self) -> Iterator[Record]:
        """A record a picture; its key is its path in the folder, without suffix."""
        for number, path in enumerate(self._piece.files):
            yield Record(plain_name(str(path.relative_to(self._piece.folder).with_suffix(""))), number)

    def read(self, record: Record) -> Picture:
        """A picture and what stands beside it."""
        path = self._piece.files[record.at]
        beside = [path.with_suffix(suffix) for suffix in (".txt", ".json")]
        caption, scores = (other.read_bytes() if other.is_file() else None for other in beside)
        return Picture(record.key, path.read_bytes(), caption, scores_of(scores))

    def where(self, record: Record) -> str:
        """The folder and the key."""
        return f"{self._piece.folder}, key {record.key!r}"


def piece_files(piece: InputSplit) -> list[Path]:
    """Every file that a piece reads."""
    beside = [file.with_suffix(suffix) for file in piece.files for suffix in (".txt", ".json")]
    return [*piece.files, *(path for path in beside if piece.folder and path.is_file())]


def _of_file(kind: Kind, path: Path) -> Iterator[tuple]:
    """A large file in parts: row groups, or lines by their bytes. Tars stay whole: a key that comes twice is
    known by the keys before it, and where a member starts by the one before."""
    parts: list[tuple[int, int]] = []
    if path.stat().st_size <= BYTES_A_PIECE:
        pass
    elif path.suffix.lower() == ".parquet":
        parts = group_parts(path, BYTES_A_PIECE)
    elif kind != "pair":
        parts = byte_parts(path, BYTES_A_PIECE)
    for part in parts if len(parts) > 1 else [()]:
        yield None, (path,), part


def _of_folder(kind: Kind, folder: Path) -> Iterator[tuple]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if kind != "pair":
        yield from chain.from_iterable(_of_file(kind, file) for file in files)
        return
    if packed := next((f for f in files if f.suffix == ".tgz" or re.search(r"\.tar\.\w+$", f.name)), None):
        raise _packed(packed)
    tars = {file.with_suffix("") for file in files if file.suffix == ".tar"}
    for file in files:
        # img2dataset writes a .parquet of figures beside each tar, without pictures.
        if file.suffix == ".tar" or (file.suffix == ".parquet" and file.with_suffix("") not in tars):
            yield from _of_file(kind, file)
    pictures = [file for file in files if file.suffix.lower().lstrip(".") in IMAGE_SUFFIXES]
    for first in range(0, len(pictures), PICTURES_A_PIECE):
        yield folder, tuple(pictures[first : first + PICTURES_A_PIECE])
