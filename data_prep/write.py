"""The second pass: the documents of one shard, from records that are known to be good."""

import io
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from data_prep.config import PreprocessConfig, SplitConfig
from data_prep.images import decode_caption, open_rgb
from data_prep.readers.records import Picture, Record
from megafusion.data.document_format import AFTER_TEXT, StoredDocument
from megafusion.data.shards import ShardSummary, write_shard
from megafusion.errors import UserError
from megafusion.images.codec import ImageCodec
from megafusion.images.processor import fit_rgb, to_tensor
from megafusion.images.sizes import nearest_size
from megafusion.sequence.tokenizer import Tokenizer
from megafusion.storage import file_sha256, write_file

CAPTION_SHOWN = 80
WEBP_QUALITY = 95
Part = np.ndarray | Image.Image | bytes
"""A text's ids; a picture to be encoded; or one that is kept, as its bytes."""
CHANGED = "has changed since it was scanned"


def make_shard(
    folder: Path, work: Path, number: int, documents: Callable[[], Iterable[StoredDocument]]
) -> ShardSummary:
    """Write a shard and the record that it is whole; one that is there already stays.

    It is made beside its place and moved there, its record last, so that a kill leaves no half of anything.
    """
    record = shard_record(work, number)
    found = read_record(record)
    if found and _is_whole(folder, found):
        return found
    with tempfile.TemporaryDirectory(dir=work, prefix=f"shard-{number:06d}.") as beside:
        made = write_shard(Path(beside), number, list(documents()))
        for path in sorted(Path(beside).iterdir()):
            path.replace(folder / path.name)
    write_file(record, made.model_dump_json())
    return made


def shard_record(work: Path, number: int) -> Path:
    """Where it is said that a shard is whole."""
    return work / "shards" / f"{number:06d}.json"


def read_record(path: Path) -> ShardSummary | None:
    """What is said of a shard; None where nothing is."""
    return ShardSummary.model_validate_json(path.read_bytes()) if path.is_file() else None


def _is_whole(folder: Path, summary: ShardSummary) -> bool:
    path = folder / summary.entry.name
    index = path.with_suffix(".index.npy")
    return path.is_file() and index.is_file() and file_sha256(path) == summary.entry.sha256


class DocumentMaker:
    """Records to documents: tokens, and latents in batches of one size that the shard alone decides.

    A batch's size can change the last bits of its latents, so batches begin anew with each shard, whoever
    makes it and whatever came before.
    """

    def __init__(self, config: PreprocessConfig, tokenizer: Tokenizer, codec: ImageCodec | None):
        self._config, self._tokenizer, self._codec = config, tokenizer, codec

    def documents(self, records: Iterator[tuple[Record, Any, str]]) -> Iterator[StoredDocument]:
        """Documents of records, each with what its reader gives and where it stands."""
        batch: list[tuple[dict, list[Part]]] = []
        num_images = 0
        for record, raw, where in records:
            try:
                parsed = self._parse(record, raw)
            except UserError as error:
                raise UserError(f"{where}: {CHANGED} ({error}); start again") from error
            for metadata, parts in parsed:
                batch.append((metadata, parts))
                num_images += sum(isinstance(part, Image.Image) for part in parts)
                if num_images >= self._config.batch_size:
                    yield from self._encoded(batch)
                    batch, num_images = [], 0
        yield from self._encoded(batch)

    def _parse(self, record: Record, raw: Any) -> list[tuple[dict, list[Part]]]:
        if isinstance(raw, Picture):
            caption = decode_caption(raw.caption)
            parts = [self._tokens(caption), self._picture(raw.content)]
            return [({"key": record.key, "caption": caption}, parts)]
        if isinstance(raw, str):
            return [({"line": int(record.key)}, [self._tokens(raw.strip())])]
        parts = [self._picture(part) if isinstance(part, bytes) else self._tokens(part) for part in raw]
        about = {"key": record.key, "caption": _beginning(raw)}
        pieces = split(parts, self._config.split)
        found, has_text = [], False
        for number, piece in enumerate(pieces):
            after = {AFTER_TEXT: True} if has_text else {}
            found.append((about | {"part": number} | after, piece))
            has_text |= any(isinstance(part, np.ndarray) for part in piece)
        return found

    def _tokens(self, text: str) -> np.ndarray:
        return np.array(self._tokenizer.encode(text), np.int32)

    def _picture(self, content: bytes) -> Image.Image | bytes:
        picture, sizes = open_rgb(content), self._config.image_sizes
        height, width = sizes[nearest_size(picture.height, picture.width, sizes)]
        return fit_rgb(picture, height, width) if self._codec else compressed(picture, height, width)

    def _encoded(self, batch: list[tuple[dict, list[Part]]]) -> Iterator[StoredDocument]:
        pictures = [part for _, parts in batch for part in parts if isinstance(part, Image.Image)]
        made: dict[int, np.ndarray] = {}
        for height, width in self._config.image_sizes:
            own = [number for number, p in enumerate(pictures) if p.size == (width, height)]
            for first in range(0, len(own), self._config.batch_size):
                some = own[first : first + self._config.batch_size]
                made |= zip(some, self._moments([pictures[number] for number in some]), strict=True)
        moments = (made[number] for number in range(len(pictures)))
        for metadata, parts in batch:
            segments = [next(moments) if isinstance(part, Image.Image) else part for part in parts]
            yield StoredDocument(metadata, tuple(segments))

    def _moments(self, pictures: list[Image.Image]) -> np.ndarray:
        """Mean and log-variance, float16 [n, 2, C, h, w], of at most a batch of pictures of one size."""
        pixels = to_tensor(pictures, pictures[0].size[::-1]).to(self._codec.model.device)
        return torch.stack(self._codec.encode(pixels), dim=1).to(torch.float16).cpu().numpy()


def compressed(picture: Image.Image, height: int, width: int) -> bytes:
    """A picture as WebP, made as small as still covers a height and a width."""
    scale = max(width / picture.width, height / picture.height)
    if scale < 1:
        least = (width, height)
        whole = tuple(max(a, round(side * scale)) for a, side in zip(least, picture.size, strict=True))
        picture = picture.resize(whole, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=WEBP_QUALITY)
    return buffer.getvalue()


def split(parts: list[Part], most: SplitConfig) -> list[list[Part]]:
    """A document's parts as documents within the limits; images stay whole, texts are cut where they must.

    Where there is no image nothing is split: streams cut texts themselves.
    """
    if all(isinstance(part, np.ndarray) for part in parts):
        return [parts]
    pieces: list[list[Part]] = [[]]
    num_tokens = num_images = 0
    for part in parts:
        if not isinstance(part, np.ndarray):
            if num_images == most.images:
                pieces.append([])
                num_tokens = num_images = 0
            pieces[-1].append(part)
            num_images += 1
            continue
        while len(part):
            if num_tokens == most.tokens:
                pieces.append([])
                num_tokens = num_images = 0
            some, part = part[: most.tokens - num_tokens], part[most.tokens - num_tokens :]
            pieces[-1].append(some)
            num_tokens += len(some)
    return pieces


def _beginning(parts: list[str | bytes]) -> str:
    return next((part[:CAPTION_SHOWN] for part in parts if isinstance(part, str)), "")
