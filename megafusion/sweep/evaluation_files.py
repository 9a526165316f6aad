"""Files that an evaluation reads, and the hash by which its report is told from others. Imports no torch."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from megafusion.evaluate.config import EvaluateConfig
from megafusion.storage import file_sha256, folder_sha256, read_json


def missing_files(options: EvaluateConfig) -> Iterator[str]:
    """Key and path of each file or folder that an evaluation reads and this machine does not see."""
    for key, path in _files(options):
        if not path.exists():
            yield f"evaluate.options.{key} {path}"


def _files(options: EvaluateConfig) -> Iterator[tuple[str, Path]]:
    """Files and folders that an evaluation reads, by key."""
    for key, value in options:
        yield from (
            (key, each)
            for each in (value if isinstance(value, tuple) else (value,))
            if isinstance(each, Path)
        )
    if (detector := options.detector) and (Path(detector).is_dir() or ":" not in detector):
        yield "detector", Path(detector)


def _images(options: EvaluateConfig) -> Iterator[tuple[str, Path]]:
    """Images that the annotations name, and where they are; none of a file that is not there."""
    if not (path := options.annotations) or not path.is_file():
        return
    images = read_json(path, "give COCO's annotation file for captions").get("images")
    for image in images if isinstance(images, list) else []:
        if isinstance(image, dict) and isinstance(name := image.get("file_name"), str):
            yield name, (options.image_folder or path.parent) / name


def evaluation_sha256(suites: Sequence[str], options: EvaluateConfig) -> str:
    """Hash of suites and options, with the contents of files in place of their paths.

    A file that this machine does not see counts by its path. Of an image folder, the images that the
    annotations name count.
    """
    files = [(key, path) for key, path in _files(options) if key != "image_folder"]
    asked = options.model_dump(mode="json", exclude={key for key, _ in files} | {"image_folder"})
    contents = [(name, _sha256(path, _stamp(path))) for name, path in (*files, *_images(options))]
    return hashlib.sha256(json.dumps([list(suites), asked, contents], sort_keys=True).encode()).hexdigest()


def _stamp(path: Path) -> tuple[tuple[Path, int, int], ...]:
    """Times and sizes of a file, or of a folder's files, which change with their contents."""
    files = sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]
    return tuple((file, file.stat().st_mtime_ns, file.stat().st_size) for file in files if file.exists())


@cache
def _sha256(path: Path, stamp: tuple) -> str:
    """Hex digest of a file or a folder; the path of one that is not there. It is read again when
    its stamp changes."""
    if not path.exists():
        return str(path)
    return folder_sha256(path) if path.is_dir() else file_sha256(path)
