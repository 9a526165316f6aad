"""Parses the bytes of one document in a shard into arrays: a few tar headers and npy headers.

Nothing is ever written to disk, and only these members are accepted: plain files named `KEY.json`,
`KEY.0.tokens.npy`, `KEY.1.moments.npy` (or `KEY.1.picture.webp`, `KEY.1.codes.npy`) and so on, of one key,
each once. tarfile and np.load would take longer than sampling the noise does.
"""

import ast
import json
import math
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import lru_cache
from mmap import mmap
from typing import Any, NamedTuple

import numpy as np

from megafusion.errors import UserError
from megafusion.sequence.document import Segment

BLOCK = 512
MEMBER_ENDINGS = {
    "tokens": "tokens.npy",
    "moments": "moments.npy",
    "pixels": "picture.webp",
    "codes": "codes.npy",
}
"""By kind of segment: its member's name after the number."""
KINDS: dict[str, Any] = {ending: kind for kind, ending in MEMBER_ENDINGS.items()}
ARRAYS: dict[str, Any] = {
    "tokens": (np.dtype("<i4"), 1),
    "moments": (np.dtype("<f2"), 4),
    "codes": (np.dtype("<i4"), 2),
}
"""By kind of segment: type and number of axes, where it is an array."""
MAX_HEADER_BYTES = 1024
"""Of an array in a shard. numpy writes 128."""
NUMBER = re.compile("0|[1-9][0-9]{0,8}")
AFTER_TEXT = "after_text"
"""Key of a document's metadata: it continues another document, which has text."""
GIVEN = "given"
"""Key of a document's metadata: the indices, among its images, of those that are given."""


class BadDocument(UserError):
    """A document that may be skipped, because its own bytes are bad: on every rank and at every try."""

    def __init__(self, where: str, reason: str):
        super().__init__(f"{where}: not readable ({reason}); preprocess again, or set data.on_error=skip")
        self.reason = reason


class CorruptBytes(ValueError):
    """Why bytes are not a document; the caller knows where they are."""


def exceeds_error_budget(num_skipped: int, num_seen: int, max_rate: float) -> bool:
    """Whether `num_skipped` exceeds what `max_rate` predicts by three standard deviations plus three."""
    expected = max_rate * num_seen
    return num_skipped > expected + 3 * math.sqrt(expected) + 3


@dataclass(frozen=True)
class StoredDocument:
    """A document as stored: metadata, and its texts and images in order."""

    metadata: dict
    segments: tuple[Segment, ...]


class Member(NamedTuple):
    """A plain file in a tar: its name, offsets of its header and its content, and its size."""

    name: str
    header: int
    start: int
    size: int


def tar_members(content: bytes | mmap) -> Iterator[Member]:
    """The members of a tar, or of a part that starts at a header. CorruptBytes for other than plain files."""
    offset, end = 0, len(content)
    while offset + BLOCK <= end:
        header = bytes(content[offset : offset + BLOCK])
        if not any(header):  # the zero blocks that end a tar
            return
        try:
            size, checksum = int(header[124:136].strip(b"\0 "), 8), int(header[148:156].strip(b"\0 "), 8)
            name = header[: header.index(0)].decode("ascii")
        except ValueError as error:
            raise CorruptBytes("not a tar header where a member should start") from error
        if sum(header) - sum(header[148:156]) + 8 * 32 != checksum:
            raise CorruptBytes("damaged tar header")
        if header[156:157] not in (b"0", b"\0"):
            raise CorruptBytes("a member is a link or otherwise not a plain file")
        start = offset + BLOCK
        if size < 0 or start + size > end:
            raise CorruptBytes("a member extends beyond the document")
        yield Member(name, offset, start, size)
        offset = start + -(-size // BLOCK) * BLOCK
    if offset < end:
        raise CorruptBytes("bytes after the last member")


def parse_document(
    content: bytes, latent_shapes: Collection[tuple[int, ...]], codebook_size: int = 0
) -> StoredDocument:
    """Parse a document. latent_shapes, codebook_size: those of the manifest. Raises CorruptBytes."""
    metadata, key = None, None
    segments: dict[int, Segment] = {}
    for member in tar_members(content):
        own_key, _, member_name = member.name.partition(".")
        if "/" in member.name or "\\" in member.name or not own_key:
            raise CorruptBytes("a member's name is a path")
        if key not in (None, own_key):
            raise CorruptBytes("members of several keys in one document")
        key = own_key
        data = content[member.start : member.start + member.size]
        if member_name == "json":
            if metadata is not None:
                raise CorruptBytes("two .json members of one key")
            metadata = _metadata(data)
            continue
        number, _, ending = member_name.partition(".")
        kind = KINDS.get(ending)
        if kind is None:
            raise CorruptBytes("a member of unknown kind")
        if not NUMBER.fullmatch(number) or int(number) in segments:
            raise CorruptBytes("members duplicated or without a number")
        value = _array(data, kind, latent_shapes, codebook_size) if kind in ARRAYS else data
        segments[int(number)] = Segment(kind, value)
    if metadata is None:
        raise CorruptBytes("no .json member")
    # webdataset writes members in the order of their names, 10 before 2.
    if sorted(segments) != list(range(len(segments))):
        raise CorruptBytes("members missing")
    return StoredDocument(metadata, tuple(segments[n] for n in range(len(segments))))


def _metadata(data: bytes) -> dict:
    try:
        metadata = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CorruptBytes("its .json member is not valid JSON") from error
    if not isinstance(metadata, dict):
        raise CorruptBytes("its .json member is not a mapping")
    return metadata


def _array(
    data: bytes, kind: str, latent_shapes: Collection[tuple[int, ...]], codebook_size: int
) -> np.ndarray:
    """A view of an npy member: tokens [L]; moments [2, C, H, W] or codes [H, W] of a shape that the manifest
    gives."""
    dtype, ndim = ARRAYS[kind]
    if data[:8] != b"\x93NUMPY\x01\x00":
        raise CorruptBytes("a member is not an npy file of version 1")
    start = 10 + int.from_bytes(data[8:10], "little")
    found, shape = _npy_header(data[10:start])
    if found != dtype or len(shape) != ndim:
        raise CorruptBytes(f"an array of type {found} and shape {shape}, expected {dtype} with {ndim} axes")
    shapes = {
        "tokens": [shape],
        "moments": [(2, *each) for each in latent_shapes],
        "codes": [each[1:] for each in latent_shapes],
    }
    if shape not in shapes[kind]:
        known = " or ".join(map(str, shapes[kind])) or "none"
        raise CorruptBytes(f"{kind} of shape {shape} where the manifest says {known}")
    size = int(np.prod(shape))
    if len(data) != start + size * dtype.itemsize:
        raise CorruptBytes("an array whose number of bytes does not match its shape")
    array = np.frombuffer(data, dtype, size, start).reshape(shape)
    if kind != "moments" and size and array.min() < 0:
        raise CorruptBytes("a negative token" if kind == "tokens" else "a negative code")
    if kind == "codes" and size and (largest := array.max()) >= codebook_size:
        raise CorruptBytes(f"code {largest} beyond the manifest's codebook of {codebook_size}")
    if kind == "moments" and ((array.view(np.uint16) & 0x7C00) == 0x7C00).any():
        raise CorruptBytes("moments contain NaN or Inf")
    return array


@lru_cache(4096)
def _npy_header(text: bytes) -> tuple[np.dtype, tuple[int, ...]]:
    """Type and shape of an array. Cached, because few headers differ."""
    if len(text) > MAX_HEADER_BYTES:  # a long one may be nested too deeply for Python's parser
        raise CorruptBytes("a member is not an npy file")
    try:
        header = ast.literal_eval(text.decode("latin1"))
        dtype, shape = np.dtype(header["descr"]), tuple(int(n) for n in header["shape"])
    except (
        ValueError,
        SyntaxError,
        KeyError,
        TypeError,
        OverflowError,
        RecursionError,
        MemoryError,
    ) as error:
        raise CorruptBytes("a member is not an npy file") from error
    if header.get("fortran_order") or dtype.hasobject or min(shape, default=0) < 0:
        raise CorruptBytes("an array of an unsupported layout")
    return dtype, shape
