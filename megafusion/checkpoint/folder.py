"""A checkpoint's folder: complete with its manifest, or no checkpoint."""

import json
import os
import re
import shutil
from pathlib import Path

from megafusion.errors import UserError
from megafusion.storage import file_sha256

KINDS = ("model", "ema", "exp_avg", "exp_avg_sq")
MANIFEST = "manifest.json"
FORMAT = "megafusion-checkpoint/1"
PARTIAL = ".partial"


def complete_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints of a run, oldest first."""
    found = [
        p for p in folder.glob("step-*") if re.fullmatch(r"step-\d+", p.name) and (p / MANIFEST).is_file()
    ]
    return sorted(found, key=step_of)


def verify_checkpoint(path: Path, first: int = 0, stride: int = 1) -> None:
    """Raise UserError naming the file that is missing or not as it was written.

    first, stride: hash every stride-th file from the first on, for ranks that share the work.
    """
    files = read_manifest(path)
    # The largest first, so that shares are about equal.
    for name in sorted(files, key=lambda name: -files[name]["bytes"])[first::stride]:
        file, entry = path / name, files[name]
        if not file.is_file():
            raise UserError(f"{file}: missing from the checkpoint; {way_out(path)}")
        if file.stat().st_size != entry["bytes"] or file_sha256(file) != entry["sha256"]:
            raise UserError(f"{file}: not as it was written; {way_out(path)}")


def read_manifest(path: Path) -> dict[str, dict]:
    """`bytes` and `sha256` of a checkpoint's files. UserError where it is not complete or not readable."""
    if not (path / MANIFEST).is_file():
        raise UserError(f"{path}: no {MANIFEST}, so no complete checkpoint; {way_out(path)}")
    try:
        files = json.loads((path / MANIFEST).read_text())["files"]
        return {name: {"bytes": int(e["bytes"]), "sha256": str(e["sha256"])} for name, e in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path / MANIFEST}: not readable ({error}); {way_out(path)}") from error


def way_out(path: Path) -> str:
    return f"delete {path} to go on from the checkpoint before"


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def hash_files(folder: Path, pattern: str) -> dict[str, dict]:
    """Sizes and hashes of files, as the manifest has them."""
    return {
        str(file.relative_to(folder)): {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
        for file in sorted(folder.glob(pattern))
    }


def publish(partial: Path, path: Path, files: dict[str, dict]) -> None:
    """Write the manifest, and rename the folder into place."""
    with (partial / MANIFEST).open("w") as manifest:
        json.dump({"format": FORMAT, "files": files}, manifest, indent=1)
        manifest.flush()
        os.fsync(manifest.fileno())
    shutil.rmtree(path, ignore_errors=True)
    partial.rename(path)
