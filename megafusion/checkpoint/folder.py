"""A checkpoint's folder, complete only with its manifest."""

import errno
import json
import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from megafusion.errors import UserError
from megafusion.storage import file_sha256, read_json

KINDS = ("model", "ema", "exp_avg", "exp_avg_sq")
MANIFEST = "manifest.json"
FORMAT = "megafusion-checkpoint/1"
PARTIAL = ".partial"
OLDER = f".older{PARTIAL}"
DAMAGED = ".damaged"


class DamagedCheckpoint(UserError):
    """A file of a checkpoint is missing, or differs from the manifest."""


def is_checkpoint(path: Path) -> bool:
    """Whether a path is that of a checkpoint, complete or not."""
    return path.is_dir() and re.fullmatch(r"step-\d+", path.name) is not None


def all_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in a folder, complete or not, oldest first."""
    return sorted(filter(is_checkpoint, folder.glob("step-*")), key=step_of)


def complete_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints in a folder, oldest first."""
    return [path for path in all_checkpoints(folder) if (path / MANIFEST).is_file()]


def best_checkpoint(checkpoints: Sequence[Path]) -> Path | None:
    """The one with the lowest validation_loss, the later of equal ones; None if no loss was measured."""
    losses = [_validation_loss(path) for path in checkpoints]
    measured = [(loss, -index) for index, loss in enumerate(losses) if loss is not None]
    return checkpoints[-min(measured)[1]] if measured else None


def _validation_loss(path: Path) -> float | None:
    """Of a checkpoint; None where none was measured, and of a damaged one, which `load` will name."""
    try:
        return read_json(path / "state.json").get("validation_loss")
    except UserError:
        return None


def training_flops(checkpoint: Path) -> float | None:
    """FLOPs of training until a checkpoint; None of one that an earlier version of megafusion began."""
    flops = read_json(checkpoint / "state.json").get("flops")
    return None if flops is None else float(flops)


def latest_checkpoint(run: Path) -> Path:
    """The latest complete checkpoint of a run folder. UserError if it has none."""
    found = complete_checkpoints(run / "checkpoints")
    if not found:
        raise UserError(f"{run}: the run has no complete checkpoint yet; train it further")
    return found[-1]


def checkpoint_at(path: Path) -> Path | None:
    """The absolute path of a checkpoint, or of a run folder's latest complete one; None for another path."""
    path = Path(os.path.normpath(path.absolute()))  # names are read, also those of "." and ".."
    if (path / "config.yaml").is_file():
        return latest_checkpoint(path)
    return path if is_checkpoint(path) else None


def newest_step(run: Path) -> int:
    """Step of the newest complete checkpoint of a run folder; 0 without one."""
    return max(map(step_of, complete_checkpoints(run / "checkpoints")), default=0)


def verify_checkpoint(path: Path, first: int = 0, stride: int = 1) -> None:
    """Check the size and SHA-256 of every file. Raises DamagedCheckpoint naming the first bad one.

    first, stride: check every stride-th file from the first on, so that ranks share the work.
    """
    files = read_manifest(path)
    # The largest first, so that ranks read about equally much.
    for name in sorted(files, key=lambda name: -files[name]["bytes"])[first::stride]:
        file, entry = path / name, files[name]
        if not file.is_file():
            raise DamagedCheckpoint(f"{file}: missing from the checkpoint; {way_out(path)}")
        try:
            is_whole = file.stat().st_size == entry["bytes"] and file_sha256(file) == entry["sha256"]
        except OSError as error:
            if error.errno == errno.EIO:  # the disk has lost it
                raise DamagedCheckpoint(f"{file}: damaged: an I/O error; {way_out(path)}") from error
            raise UserError(f"{file}: cannot be read ({error.strerror or error}); fix that first") from error
        if not is_whole:
            raise DamagedCheckpoint(
                f"{file}: damaged: size or SHA-256 is not the manifest's; {way_out(path)}"
            )


def read_manifest(path: Path) -> dict[str, dict]:
    """Size (`bytes`) and `sha256` of a checkpoint's files.

    Raises DamagedCheckpoint if the manifest is missing, or is not byte for byte what `publish` writes for the
    entries in it: no other file holds its hash.
    """
    if not (path / MANIFEST).is_file():
        raise DamagedCheckpoint(f"{path}: no {MANIFEST}, so the checkpoint is incomplete; {way_out(path)}")
    try:
        text = (path / MANIFEST).read_text()
        files = json.loads(text)["files"]
        files = {name: {"bytes": int(e["bytes"]), "sha256": str(e["sha256"])} for name, e in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"{path / MANIFEST}: damaged: {error}; {way_out(path)}") from error
    if text != _manifest(files):
        raise DamagedCheckpoint(f"{path / MANIFEST}: damaged: its text was changed; {way_out(path)}")
    return files


def _manifest(files: dict[str, dict]) -> str:
    return json.dumps({"format": FORMAT, "files": files}, indent=1)


def way_out(path: Path) -> str:
    """Advice to the user for a damaged checkpoint."""
    if any(other.name < path.name for other in complete_checkpoints(path.parent)):
        return "use the previous checkpoint, as `megafusion train` does"
    return "there is no earlier checkpoint: restore this one from a backup"


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def hash_files(folder: Path, pattern: str) -> dict[str, dict]:
    """Manifest entries of files: size and SHA-256."""
    return {
        str(file.relative_to(folder)): {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
        for file in sorted(folder.glob(pattern))
    }


def publish(partial: Path, path: Path, files: dict[str, dict]) -> None:
    """Write the manifest, and rename the folder to its final name."""
    (partial / MANIFEST).write_text(_manifest(files))
    # DCP has synced the tensors; the rest must reach the disk before the name does.
    for written in (partial / "state.json", partial / MANIFEST, partial / "tensors", partial):
        _sync(written)
    # A step may be saved again, with other counts; its older checkpoint stays complete until then.
    older = path.with_name(path.name + OLDER)
    if path.exists():
        path.rename(older)
    partial.rename(path)
    _sync(path.parent)
    shutil.rmtree(older, ignore_errors=True)


def clean_up(folder: Path) -> None:
    """Remove what a killed process left behind; a checkpoint that it was about to replace is renamed back."""
    for left_behind in folder.glob(f"step-*{PARTIAL}"):
        path = left_behind.with_name(left_behind.name.removesuffix(OLDER))
        if left_behind.name.endswith(OLDER) and not path.exists():
            left_behind.rename(path)
        else:
            remove(left_behind)


def remove(path: Path) -> None:
    """Delete a checkpoint, or the rest of one. Warn if it cannot be deleted."""
    try:
        if not path.name.endswith(PARTIAL):
            # Renamed first, because deleting takes a while and may be interrupted.
            path = path.rename(path.with_name(path.name + PARTIAL))
        shutil.rmtree(path)
    except OSError as error:
        print(f"warning: {path}: cannot be deleted ({error.strerror or error})", file=sys.stderr)


def _sync(path: Path) -> None:
    """Sync a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def quarantine(path: Path) -> None:
    """Rename a damaged checkpoint, so that it is no longer found."""
    quarantined = path.with_name(path.name + DAMAGED)
    shutil.rmtree(quarantined, ignore_errors=True)
    path.rename(quarantined)
