"""Images with reference captions, from COCO's annotation file for captions. Imports no torch."""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from megafusion.errors import UserError
from megafusion.sequence.text import clean_text
from megafusion.storage import read_json

T = TypeVar("T")
ALL = "all"
"""Group of images without a `group`."""
GROUP = re.compile(r"\w[\w.-]*")
"""It names a file, too."""


@dataclass(frozen=True)
class AnnotatedImage:
    """An image of an annotation file. captions: one or several, cleaned. key: names what it shows, for a
    judge; None if the file names none."""

    id: int | str
    path: Path
    captions: tuple[str, ...]
    group: str
    key: str | None


def read_annotations(path: Path, image_folder: Path | None = None) -> list[AnnotatedImage]:
    """The images of an annotation file, in its order. Raises UserError naming what is wrong with it."""
    values = read_json(path, "give COCO's annotation file for captions")
    images, annotations = _records(values, "images", path), _records(values, "annotations", path)
    captions: dict[Any, list[str]] = defaultdict(list)
    for annotation in annotations:
        image, caption = _value(annotation, "image_id", path), _value(annotation, "caption", path)
        text = clean_text(caption) if isinstance(caption, str) else ""
        if not text:
            raise UserError(f"{path}: annotation {annotation.get('id')} has an empty caption; write it")
        captions[image].append(text)
    folder = image_folder or path.parent
    found = [
        AnnotatedImage(
            id=_value(image, "id", path),
            path=folder / str(_value(image, "file_name", path)),
            captions=tuple(captions.pop(image["id"], ())),
            group=str(image.get("group", ALL)),
            key=image.get("key"),
        )
        for image in images
    ]
    if len({image.id for image in found}) < len(found):
        raise UserError(f"{path}: two images have one id; give each its own")
    groups = {image.group for image in found}
    if bad := sorted(group for group in groups if not GROUP.fullmatch(group)):
        raise UserError(f"{path}: group {bad[0]!r:.80}: give it a name of letters, digits, '.', '_' and '-'")
    if ALL in groups and len(groups) > 1:
        raise UserError(f"{path}: some images have a group, others none or {ALL!r}; name it for each")
    if captions:
        raise UserError(f"{path}: captions of image {min(captions, key=str)}, which is not among its images")
    if uncaptioned := [image for image in found if not image.captions]:
        raise UserError(f"{path}: {_first([i.path.name for i in uncaptioned])} without a caption; write one")
    if missing := [image.path for image in found if not image.path.is_file()]:
        raise UserError(
            f"{path}: names {_first(missing)} that is not there; set image_folder to where the images are"
        )
    return found


def spread(items: Sequence[T], most: int | None) -> list[T]:
    """At most so many of the items, evenly spaced, in their order."""
    if most is None or len(items) <= most:
        return list(items)
    return [items[len(items) * number // most] for number in range(most)]


def _first(items: Sequence[Any]) -> str:
    more = f" and {len(items) - 1} more" if len(items) > 1 else ""
    return f"{items[0]}{more}"


def _records(values: dict, key: str, path: Path) -> list[dict]:
    records = values.get(key)
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise UserError(f"{path}: has no list {key!r} of objects; give COCO's annotation file for captions")
    if not records:
        raise UserError(f"{path}: its list {key!r} is empty; there is nothing to measure")
    return records


def _value(record: dict, key: str, path: Path) -> Any:
    value = record.get(key)
    if not isinstance(value, int | str) or isinstance(value, bool):
        raise UserError(f"{path}: {key!r} is missing, or no text or number, in {record!s:.80}")
    return value
