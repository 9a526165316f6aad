"""The second pass: builds the documents of a shard from records that the scan found valid, and writes it."""

import io
import tempfile
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from data_prep.config import PreprocessConfig, SplitConfig
from data_prep.images import covering_size, decode_caption, open_rgb
from data_prep.readers.interleaved import GivenImage
from data_prep.readers.records import RawPair, Record
from megafusion.data.document_format import AFTER_TEXT, GIVEN, StoredDocument
from megafusion.data.manifest import ShardSummary
from megafusion.data.shards import write_shard
from megafusion.errors import UserError
from megafusion.images.codec import ImageCodec, QuantizedCodec
from megafusion.images.processor import preprocess_images, resize_and_crop
from megafusion.images.sizes import nearest_size
from megafusion.sequence.document import Segment
from megafusion.sequence.text import clean_text
from megafusion.sequence.tokenizer import Tokenizer
from megafusion.storage import file_sha256, write_file

CAPTION_PREVIEW_CHARS = 80
WEBP_QUALITY = 95
RawSegment = np.ndarray | Image.Image | bytes
"""Token ids; an image to encode; or an image stored as WebP."""
CHANGED = "has changed since it was scanned"


def write_shard_once(
    folder: Path, work: Path, number: int, documents: Callable[[], Iterable[StoredDocument]]
) -> None:
    """Write a shard, then its summary, which marks it complete; a complete shard is kept.

    The shard is written to a temporary folder and renamed, so a kill leaves nothing half-written.
    """
    summary = read_summary(summary_path(work, number))
    if summary and _is_complete(folder, summary):
        return
    with tempfile.TemporaryDirectory(dir=work, prefix=f"shard-{number:06d}.") as temporary:
        summary = write_shard(Path(temporary), number, list(documents()))
        for path in sorted(Path(temporary).iterdir()):
            path.replace(folder / path.name)
    write_file(summary_path(work, number), summary.model_dump_json())


def summary_path(work: Path, number: int) -> Path:
    """Path of a complete shard's summary."""
    return work / "shards" / f"{number:06d}.json"


def read_summary(path: Path) -> ShardSummary | None:
    """A shard's summary; None where it is missing."""
    return ShardSummary.model_validate_json(path.read_bytes()) if path.is_file() else None


def _is_complete(folder: Path, summary: ShardSummary) -> bool:
    path = folder / summary.entry.name
    index = path.with_suffix(".index.npy")
    return path.is_file() and index.is_file() and file_sha256(path) == summary.entry.sha256


class DocumentBuilder:
    """Builds documents from records: tokenizes texts and encodes images, in batches of one size.

    The batch size can change the last bits of latents, so batches start anew with each shard: its bytes
    depend neither on the process that writes it nor on what that process wrote before.
    """

    def __init__(self, config: PreprocessConfig, tokenizer: Tokenizer, codec: ImageCodec | None):
        self._config, self._tokenizer, self._codec = config, tokenizer, codec

    def documents(self, records: Iterator[tuple[Record, Any, str, dict]]) -> Iterator[StoredDocument]:
        """Documents of (record, what its reader returns, where it is, metadata of a text)."""
        batch: list[tuple[dict, list[RawSegment]]] = []
        num_images = 0
        for record, raw, where, origin in records:
            try:
                parsed = self._parse(record, raw, origin)
            except UserError as error:
                raise UserError(f"{where}: {CHANGED} ({error}); start again") from error
            for metadata, segments in parsed:
                batch.append((metadata, segments))
                num_images += sum(isinstance(segment, Image.Image) for segment in segments)
                if num_images >= self._config.batch_size:
                    yield from self._encode(batch)
                    batch, num_images = [], 0
        yield from self._encode(batch)

    def _parse(self, record: Record, raw: Any, origin: dict) -> list[tuple[dict, list[RawSegment]]]:
        """Metadata and segments of the documents that a record becomes; images are not encoded yet."""
        if isinstance(raw, RawPair):
            return self._pair_documents(record.key, raw)
        if isinstance(raw, str):
            return [({"line": int(record.key)} | origin, [self._tokens(clean_text(raw))])]
        segments = [self._image(open_rgb(s)) if isinstance(s, bytes) else self._tokens(s) for s in raw]
        metadata = {"key": record.key, "caption": _caption_preview(raw)}
        given = iter([isinstance(s, GivenImage) for s in raw if isinstance(s, bytes)])
        found, has_text = [], False
        for number, part in enumerate(split_document(segments, self._config.split)):
            after: dict = {AFTER_TEXT: True} if has_text else {}
            images = [s for s in part if not isinstance(s, np.ndarray)]
            if indices := [index for index, is_given in enumerate(islice(given, len(images))) if is_given]:
                after |= {GIVEN: indices}
            found.append((metadata | {"part": number} | after, part))
            has_text |= any(isinstance(segment, np.ndarray) for segment in part)
        return found

    def _pair_documents(self, key: str, raw: RawPair) -> list[tuple[dict, list[RawSegment]]]:
        """The document of a pair, and those of its augmented copies."""
        metadata, image = {"key": key, "caption": decode_caption(raw.caption)}, open_rgb(raw.image)
        tokens, augmentation = self._tokens(metadata["caption"]), self._config.augmentation
        if not augmentation:
            return [(metadata, [tokens, self._image(image)])]
        return [
            (metadata | {"copy": copy}, [tokens, self._image(augmentation.augment(image, key, copy))])
            for copy in range(augmentation.copies)
        ]

    def _tokens(self, text: str) -> np.ndarray:
        return np.array(self._tokenizer.encode(text), np.int32)

    def _image(self, image: Image.Image) -> Image.Image | bytes:
        sizes = self._config.image_sizes
        height, width = sizes[nearest_size(image.height, image.width, sizes)]
        return resize_and_crop(image, height, width) if self._codec else to_webp(image, height, width)

    def _encode(self, batch: list[tuple[dict, list[RawSegment]]]) -> Iterator[StoredDocument]:
        images = [s for _, segments in batch for s in segments if isinstance(s, Image.Image)]
        encoded: dict[int, Segment] = {}
        for height, width in self._config.image_sizes:
            own = [index for index, image in enumerate(images) if image.size == (width, height)]
            for first in range(0, len(own), self._config.batch_size):
                some = own[first : first + self._config.batch_size]
                encoded |= zip(some, self._encode_images([images[index] for index in some]), strict=True)
        in_order = (encoded[index] for index in range(len(images)))
        for metadata, segments in batch:
            stored = tuple(_stored(segment, in_order) for segment in segments)
            if not all(np.isfinite(segment.data).all() for segment in stored if segment.kind == "moments"):
                raise UserError(
                    f"{self._config.vae}: gives latents with NaN or Inf for key {metadata['key']!r}; use "
                    "another autoencoder, or remove the image"
                )
            yield StoredDocument(metadata, stored)

    def _encode_images(self, images: list[Image.Image]) -> list[Segment]:
        """Of at most batch_size images of one size: float16 mean and log-variance [2, C, h, w]; or codes."""
        assert self._codec
        pixels = preprocess_images(images, images[0].height, images[0].width).to(self._codec.model.device)
        if isinstance(self._codec, QuantizedCodec):
            codes_Nhw = self._codec.encode(pixels).to(torch.int32).cpu().numpy()
            return [Segment("codes", codes) for codes in codes_Nhw]
        moments = torch.stack(self._codec.encode(pixels), dim=1).to(torch.float16).cpu().numpy()
        return [Segment("moments", each) for each in moments]


def _stored(segment: RawSegment, encoded: Iterator[Segment]) -> Segment:
    if isinstance(segment, Image.Image):
        return next(encoded)
    return Segment("pixels" if isinstance(segment, bytes) else "tokens", segment)


def to_webp(image: Image.Image, height: int, width: int) -> bytes:
    """An image as WebP, downscaled to the smallest size that covers height x width; never upscaled."""
    if (size := covering_size(*image.size, height, width)) != image.size:
        image = image.resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=WEBP_QUALITY)
    return buffer.getvalue()


def split_document(segments: list[RawSegment], limits: SplitConfig) -> list[list[RawSegment]]:
    """Split a document into parts within the limits; images stay complete, texts are cut at the limit.

    A document without images is not split, because streams cut texts themselves.
    """
    if all(isinstance(segment, np.ndarray) for segment in segments):
        return [segments]
    parts: list[list[RawSegment]] = [[]]
    num_tokens = num_images = 0
    for segment in segments:
        if not isinstance(segment, np.ndarray):
            if num_images == limits.images:
                parts.append([])
                num_tokens = num_images = 0
            parts[-1].append(segment)
            num_images += 1
            continue
        while len(segment):
            if num_tokens == limits.tokens:
                parts.append([])
                num_tokens = num_images = 0
            room = limits.tokens - num_tokens
            head, segment = segment[:room], segment[room:]
            parts[-1].append(head)
            num_tokens += len(head)
    return parts


def _caption_preview(segments: list[str | bytes]) -> str:
    return next((s[:CAPTION_PREVIEW_CHARS] for s in segments if isinstance(s, str)), "")
