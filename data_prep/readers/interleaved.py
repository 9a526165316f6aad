"""Interleaved documents: OBELICS and edits (JSON Lines or parquet), MMC4 (JSON Lines).

OBELICS: two lists of equal length, `texts` and `images`, and perhaps a third, `given`. MMC4: sentences in
`text_list`, and in `image_info` images that are each matched to one of them. Edits: an image `source`, which
is given, a text `instruction`, and an image `target`.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import NoneType
from typing import Any

from data_prep.images import clean_input
from data_prep.readers.jsonl import LineReader, parse_json_line
from data_prep.readers.parquet import ParquetReader, image_bytes
from data_prep.readers.records import BadRecord, Record
from data_prep.readers.webdataset import tar_files
from megafusion.errors import UserError

TEXTS, IMAGES = "texts", "images"
SENTENCES, MATCHES = "text_list", "image_info"
MATCH = ("image_name", "matched_text_index")
GIVEN = "given"
EDIT = ("source", "instruction", "target")
MISSING = "an image is not in document_images"
URL = "an image is a URL: fetch the images and store them in document_images under the names used here"
NO_DOCUMENT_IMAGES = "an image is a name, but document_images is not set"


class GivenImage(bytes):
    """An encoded image that is given: a condition without a loss."""


class JsonlDocuments(LineReader):
    """Reads documents of JSON Lines, whose images are names in a tar or folder."""

    def __init__(self, path: Path, named_images: "NamedImages"):
        super().__init__(path)
        self._named_images = named_images

    def read(self, record: Record) -> list[str | bytes]:
        """Texts and encoded images in order. Raises BadRecord."""
        return document_segments(parse_json_line(self.line(record)), self._named_images)


class ParquetDocuments(ParquetReader):
    """Reads documents of parquet, whose images are bytes, or names in a tar or folder."""

    def __init__(self, path: Path, named_images: "NamedImages"):
        super().__init__(path, {}, [TEXTS, IMAGES, GIVEN, *EDIT])
        if not any(set(layout) <= set(self._columns) for layout in ((TEXTS, IMAGES), EDIT)):
            raise UserError(
                f"{path}: has neither columns {TEXTS!r} and {IMAGES!r} nor {', '.join(map(repr, EDIT))}; its "
                f"columns are {', '.join(self._file.schema_arrow.names)}"
            )
        self._named_images = named_images

    def read(self, record: Record) -> list[str | bytes]:
        """Texts and encoded images in order. Raises BadRecord."""
        return document_segments(self.row(record), self._named_images)


class NamedImages:
    """Reads images by name from one tar or folder, and nothing outside it."""

    def __init__(self, source: Path | None):
        self._source = source
        self._members: dict[str, tuple[int, int] | str] | None = None

    def __call__(self, name: str) -> bytes:
        """An encoded image. Raises BadRecord."""
        missing = URL if "://" in name else MISSING
        if self._source is None:
            raise BadRecord(URL if missing == URL else NO_DOCUMENT_IMAGES)
        if self._source.is_dir():
            return _read_in_folder(self._source, name, missing)
        if self._members is None:
            self._file = self._source.open("rb", buffering=0)
            self._members = dict(_tar_members(self._source))
        member = self._members.get(name)
        if not isinstance(member, tuple):
            raise BadRecord(missing)
        offset, size = member
        return os.pread(self._file.fileno(), size, offset)


def _read_in_folder(folder: Path, name: str, missing: str) -> bytes:
    try:
        path = (folder / name).resolve()
        if path.is_relative_to(folder.resolve()):
            return path.read_bytes()
    except (OSError, ValueError) as error:
        raise BadRecord(missing) from error
    raise BadRecord("an image's name is a path or link that leads out of document_images")


def _tar_members(path: Path) -> Iterator[tuple[str, tuple[int, int] | str]]:
    names = set()
    for name, member in tar_files(path):
        if isinstance(member, int):
            raise UserError(f"{path}: is corrupt, or not an uncompressed tar; fetch or pack it again")
        if name in names:
            raise UserError(f"{path}: has {name!r} twice; pack it again")
        names.add(name)
        yield name, member


def document_segments(values: dict, named_images: Callable[[str], bytes]) -> list[str | bytes]:
    """Texts and images of a document, in order; its keys tell the layout. Raises BadRecord."""
    if TEXTS in values or IMAGES in values:
        texts, images = values.get(TEXTS), values.get(IMAGES)
        segments = _obelics_segments(texts, images, values.get(GIVEN), named_images)
    elif SENTENCES in values and MATCHES in values:
        segments = _mmc4_segments(values[SENTENCES], values[MATCHES], named_images)
    elif set(EDIT) <= set(values):
        source, instruction, target = (values[name] for name in EDIT)
        segments = _edit_segments(source, instruction, target, named_images)
    else:
        found = ascii(sorted(values)[:8])[:100]
        raise BadRecord(
            "has neither `texts` and `images` (OBELICS), `text_list` and `image_info` (MMC4), nor `source`, "
            "`instruction` and `target` (edits)",
            f"its keys are {found}",
        )
    if not segments:
        raise BadRecord("empty document")
    return segments


def _obelics_segments(
    texts: Any, images: Any, given: Any, named_images: Callable[[str], bytes]
) -> list[str | bytes]:
    """Each index holds a text, an image, or both in this order; `given` tells which images are given."""
    if not isinstance(texts, list) or not isinstance(images, list) or len(texts) != len(images):
        raise BadRecord("`texts` and `images` are not two lists of equal length")
    given = [None] * len(images) if given is None else given
    kinds = set(map(type, given)) if isinstance(given, list) else {None}
    if not kinds <= {bool, NoneType} or len(given) != len(images):
        raise BadRecord("`given` is not a list of true, false and null, as long as `images`")
    segments: list[str | bytes] = []
    for text, image, is_given in zip(texts, images, given, strict=True):
        if not isinstance(text, str | None):
            raise BadRecord("a text is not a string")
        if text := clean_input(text or ""):
            segments.append(text)
        if (content := _image(image, named_images)) is not None:
            segments.append(GivenImage(content) if is_given else content)
        elif is_given:
            raise BadRecord("`given` is true where there is no image")
    return segments


def _edit_segments(
    source: Any, instruction: Any, target: Any, named_images: Callable[[str], bytes]
) -> list[str | bytes]:
    contents = [_image(image, named_images) for image in (source, target)]
    if not isinstance(instruction, str) or not (instruction := clean_input(instruction)):
        raise BadRecord("an edit without an instruction")
    before, after = contents
    if before is None or after is None:
        raise BadRecord("an edit without its source or target image")
    return [GivenImage(before), instruction, after]


def _image(image: Any, named_images: Callable[[str], bytes]) -> bytes | None:
    """The content of a name, of bytes, or of {bytes, path}; None for null."""
    if isinstance(image, dict) and image.get("bytes") is None:
        image = image.get("path")
    if image is None:
        return None
    return named_images(image) if isinstance(image, str) else image_bytes(image)


def _mmc4_segments(sentences: Any, matches: Any, named_images: Callable[[str], bytes]) -> list[str | bytes]:
    """Each image before the sentence that it is matched to; several of one sentence in the order listed.

    Images come before their sentence and sentences are joined by a space, as in OpenFlamingo, by authors of
    MMC4 (open_flamingo/train/data.py). MMC4 matches one image to a sentence where it can; the order of
    several is ours.
    """
    if not isinstance(sentences, list) or not isinstance(matches, list):
        raise BadRecord("`text_list` and `image_info` are not two lists")
    before: dict[int, list[str]] = {}
    for image in matches:
        name, index = (image.get(key) if isinstance(image, dict) else None for key in MATCH)
        if not isinstance(name, str) or type(index) is not int or not 0 <= index < len(sentences):
            raise BadRecord("an image without `image_name` or a `matched_text_index` that is in `text_list`")
        before.setdefault(index, []).append(name)
    segments: list[str | bytes] = []
    for index, sentence in enumerate(sentences):
        if not isinstance(sentence, str):
            raise BadRecord("a sentence is not a string")
        segments += map(named_images, before.get(index, []))
        if not (sentence := clean_input(sentence)):
            continue
        if segments and isinstance(segments[-1], str):
            segments[-1] += f" {sentence}"
        else:
            segments.append(sentence)
    return segments
