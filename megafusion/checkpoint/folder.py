"""A checkpoint's folder: complete with its manifest, or no checkpoint."""

import errno
import json
import os
import re
import shutil
import sys
from pathlib import Path

from megafusion.errors import UserError
from megafusion.storage import file_sha256

KINDS = ("model", "ema", "exp_avg", "exp_avg_sq")
MANIFEST = "manifest.json"
FORMAT = "megafusion-checkpoint/1"
PARTIAL = ".partial"
DAMAGED = ".damaged"


class DamagedCheckpoint(UserError):
    """A file of a checkpoint is missing or not as it was written."""


def complete_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints of a run, oldest first."""
    found = [
        p for p in folder.glob("step-*") if re.fullmatch(r"step-\d+", p.name) and (p / MANIFEST).is_file()
    ]
    return sorted(found, key=step_of)


def newest_checkpoint(run: Path) -> Path:
    """The newest complete checkpoint of a run folder. UserError where there is none."""
    found = complete_checkpoints(run / "checkpoints")
    if not found:
        raise UserError(f"{run}: the run has no complete checkpoint yet; train it further")
    return found[-1]


def newest_step(run: Path) -> int:
    """Step of the newest complete checkpoint of a run folder; 0 without one."""
    return max(map(step_of, complete_checkpoints(run / "checkpoints")), default=0)


def verify_checkpoint(path: Path, first: int = 0, stride: int = 1) -> None:
    """Raise DamagedCheckpoint naming the file that is missing or not as it was written.

    first, stride: hash every stride-th file from the first on, for ranks that share the work.
    """
    files = read_manifest(path)
    # The largest first, so that shares are about equal.
    for name in sorted(files, key=lambda name: -files[name]["bytes"])[first::stride]:
        file, entry = path / name, files[name]
        if not file.is_file():
            raise DamagedCheckpoint(f"{file}: missing from the checkpoint; {way_out()}")
        try:
            is_whole = file.stat().st_size == entry["bytes"] and file_sha256(file) == entry["sha256"]
        except OSError as error:
            if error.errno == errno.EIO:  # the disk has lost it
                raise DamagedCheckpoint(f"{file}: not readable any more; {way_out()}") from error
            raise UserError(f"{file}: cannot be read ({error.strerror or error}); mend that first") from error
        if not is_whole:
            raise DamagedCheckpoint(f"{file}: not as it was written; {way_out()}")


def read_manifest(path: Path) -> dict[str, dict]:
    """`bytes` and `sha256` of a checkpoint's files.

    Raises DamagedCheckpoint where the manifest is missing, or not to the byte what `publish` writes of what
    it says: nothing else has its hash.
    """
    if not (path / MANIFEST).is_file():
        raise DamagedCheckpoint(f"{path}: no {MANIFEST}, so no complete checkpoint; {way_out()}")
    try:
        text = (path / MANIFEST).read_text()
        files = json.loads(text)["files"]
        files = {name: {"bytes": int(e["bytes"]), "sha256": str(e["sha256"])} for name, e in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"{path / MANIFEST}: not readable ({error}); {way_out()}") from error
    if text != _manifest(files):
        raise DamagedCheckpoint(f"{path / MANIFEST}: not as it was written; {way_out()}")
    return files


def _manifest(files: dict[str, dict]) -> str:
    return json.dumps({"format": FORMAT, "files": files}, indent=1)


def way_out() -> str:
    return "take the checkpoint before, as `megafusion train` does"


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
    (partial / MANIFEST).write_text(_manifest(files))
    # torch has brought the tensors to the disk; the rest must be there too before the name is.
    for written in (partial / "state.json", partial / MANIFEST, partial / "tensors", partial):
        _to_disk(written)
    # A step may be saved again, with other counts: the older folder is whole until the new one is.
    older = path.with_name(f"{path.name}.older{PARTIAL}")
    if path.exists():
        path.rename(older)
    partial.rename(path)
    _to_disk(path.parent)
    shutil.rmtree(older, ignore_errors=True)


def remove(path: Path) -> None:
    """Delete a checkpoint, or what is left of one. What cannot be deleted is said and stays."""
    try:
        if not path.name.endswith(PARTIAL):
            # Under a name that is no checkpoint's, for deleting takes a while and may be cut short.
            path = path.rename(path.with_name(path.name + PARTIAL))
        shutil.rmtree(path)
    except OSError as error:
        print(f"warning: {path}: cannot be deleted ({error.strerror or error})", file=sys.stderr, flush=True)


def _to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def quarantine(path: Path) -> Path:
    """Give a damaged checkpoint a name that is none of a checkpoint, so that nothing counts on it."""
    aside = path.with_name(path.name + DAMAGED)
    shutil.rmtree(aside, ignore_errors=True)
    return path.rename(aside)
