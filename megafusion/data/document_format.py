"""The bytes of one document, as they stand in a shard, to arrays: a few tar headers and npy headers.

Nothing is ever written to disk, and nothing but these members is accepted: plain files named
`KEY.json`, `KEY.0.tokens.npy`, `KEY.1.moments.npy` (or `KEY.1.picture.webp`) and so on, of one key, each
once. tarfile and np.load would take longer over this than drawing the noise does.
"""

import ast
import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from megafusion.errors import UserError

BLOCK = 512
TYPES = {"tokens": (np.dtype("<i4"), 1), "moments": (np.dtype("<f2"), 4)}
PICTURE = "picture.webp"
NUMBER = re.compile("0|[1-9][0-9]{0,8}")


class BadDocument(UserError):
    """A document that its own bytes rule out, alike on every rank and at every try: it may be skipped."""

    def __init__(self, where: str, reason: str):
        super().__init__(f"{where}: not readable ({reason}); preprocess again, or set data.on_error=skip")
        self.reason = reason


class CorruptBytes(ValueError):
    """Why bytes are no document; the caller knows where they stand."""


AFTER_TEXT = "after_text"
"""In a document's metadata: it is a part of one, and text stands before it there."""


@dataclass(frozen=True)
class StoredDocument:
    """A document as stored: metadata, and segments in order.

    A text is int32 [L]; an image float16 [2, C, H, W], its moments, or the bytes of a picture.
    """

    metadata: dict
    segments: tuple[np.ndarray | bytes, ...]


class Member(NamedTuple):
    """A plain file in a tar: its name, where its header starts, where its content starts and its size."""

    name: str
    header: int
    start: int
    size: int


def segment_kind(segment: np.ndarray | bytes) -> str:
    """tokens, moments or picture."""
    if isinstance(segment, bytes):
        return "picture"
    return "tokens" if segment.ndim == 1 else "moments"


def tar_members(content: bytes | memoryview, whole: int | None = None) -> Iterator[Member]:
    """The members of a piece of a tar that starts at a header. Raises BadBytes for what is no plain file.

    whole: bytes of the piece where `content` is longer.
    """
    offset, end = 0, len(content) if whole is None else whole
    while offset + BLOCK <= end:
        header = bytes(content[offset : offset + BLOCK])
        if not any(header):  # the zero blocks that end a tar
            return
        try:
            size, checksum = int(header[124:136].strip(b"\0 "), 8), int(header[148:156].strip(b"\0 "), 8)
            name = header[: header.index(0)].decode("ascii")
        except ValueError as error:
            raise CorruptBytes("no tar header where a member should start") from error
        if sum(header) - sum(header[148:156]) + 8 * 32 != checksum:
            raise CorruptBytes("damaged tar header")
        if header[156:157] not in (b"0", b"\0"):
            raise CorruptBytes("a member is a link or another thing that is no plain file")
        start = offset + BLOCK
        if size < 0 or start + size > end:
            raise CorruptBytes("a member is longer than what is there of it")
        yield Member(name, offset, start, size)
        offset = start + -(-size // BLOCK) * BLOCK
    if offset < end:
        raise CorruptBytes("bytes are left over after the last member")


def parse_document(content: bytes, latent_shapes: Collection[tuple[int, ...]]) -> StoredDocument:
    """A document from its members; latent_shapes: those that an image may have.

    Raises BadBytes saying what is wrong with them.
    """
    metadata, key = None, None
    segments: dict[int, np.ndarray | bytes] = {}
    for member in tar_members(content):
        own_key, _, kind = member.name.partition(".")
        if "/" in member.name or "\\" in member.name or not own_key:
            raise CorruptBytes("a member is named as a path")
        if key not in (None, own_key):
            raise CorruptBytes("members of several keys where the index says one")
        key = own_key
        data = content[member.start : member.start + member.size]
        if kind == "json":
            if metadata is not None:
                raise CorruptBytes("two .json members of one key")
            metadata = _metadata(data)
            continue
        number, _, name = kind.partition(".")
        is_picture = name == PICTURE
        if not (is_picture or (name.endswith(".npy") and name[:-4] in TYPES)):
            raise CorruptBytes("a member of unknown kind")
        if not NUMBER.fullmatch(number) or int(number) in segments:
            raise CorruptBytes("members doubled or without a number")
        segments[int(number)] = bytes(data) if is_picture else _array(data, *TYPES[name[:-4]], latent_shapes)
    if metadata is None:
        raise CorruptBytes("no .json member")
    # webdataset writes members in the order of their names, 10 before 2.
    if sorted(segments) != list(range(len(segments))):
        raise CorruptBytes("members missing")
    return StoredDocument(metadata, tuple(segments[n] for n in range(len(segments))))


def _metadata(data: bytes) -> dict:
    try:
        metadata = json.loads(data)
    except ValueError as error:
        raise CorruptBytes("its .json member is no JSON") from error
    if not isinstance(metadata, dict):
        raise CorruptBytes("its .json member is no mapping")
    return metadata


def _array(data: bytes, dtype: np.dtype, ndim: int, latent_shapes: Collection[tuple[int, ...]]) -> np.ndarray:
    """A view of an npy member: tokens [L], or moments [2, C, H, W] of a shape that the manifest gives."""
    if data[:8] != b"\x93NUMPY\x01\x00":
        raise CorruptBytes("a member is no npy file of version 1")
    start = 10 + int.from_bytes(data[8:10], "little")
    found, shape = _npy_header(data[10:start])
    if found != dtype or len(shape) != ndim:
        raise CorruptBytes(
            f"an array of type {found} and shape {shape} where {dtype} with {ndim} axes belongs"
        )
    if ndim > 1 and (shape[0] != 2 or shape[1:] not in latent_shapes):
        known = " or ".join(str((2, *known)) for known in latent_shapes) or "none"
        raise CorruptBytes(f"moments of shape {shape} where the manifest says {known}")
    size = int(np.prod(shape))
    if len(data) != start + size * dtype.itemsize:
        raise CorruptBytes("an array's bytes are not as many as its shape says")
    array = np.frombuffer(data, dtype, size, start).reshape(shape)
    if ndim == 1 and size and array.min() < 0:
        raise CorruptBytes("a negative token")
    if ndim > 1 and ((array.view(np.uint16) & 0x7C00) == 0x7C00).any():
        raise CorruptBytes("moments that are not finite")
    return array


@lru_cache(4096)
def _npy_header(text: bytes) -> tuple[np.dtype, tuple[int, ...]]:
    """Type and shape; few headers differ, so each is read once."""
    try:
        header = ast.literal_eval(text.decode("latin1"))
        dtype, shape = np.dtype(header["descr"]), tuple(int(n) for n in header["shape"])
    except (ValueError, SyntaxError, KeyError, TypeError) as error:
        raise CorruptBytes("a member is no npy file") from error
    if header.get("fortran_order") or dtype.hasobject or min(shape, default=0) < 0:
        raise CorruptBytes("an array of a layout that is never written")
    return dtype, shape
