"""Checkpoints: tensors under canonical names, complete or not there at all.

A checkpoint is a folder `step-00000400` with `tensors/` (torch.distributed.checkpoint: model, ema,
exp_avg and exp_avg_sq, each by parameter name), `state.json` (step and stream states) and, written
last, `manifest.json` with the size and hash of every file. It is made beside its place and renamed
into it. No random state is kept, for nothing in a step draws from a global generator.
"""

import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from deepspeed import DeepSpeedEngine
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import Tensor

from megafusion.errors import UserError
from megafusion.storage import file_sha256
from megafusion.train.ema import Ema
from megafusion.train.engine import together
from megafusion.train.reader import Reader

MOMENTS = ("exp_avg", "exp_avg_sq")
MANIFEST = "manifest.json"


def save_checkpoint(
    folder: Path, engine: DeepSpeedEngine, ema: Ema, state: dict, stream_state: dict, keep_last: int
) -> Path:
    """Write `folder`/step-N and delete all but the newest `keep_last`. Called by every rank.

    state: plain values, `step` among them, to which the streams of all ranks are added as `data`.

    Raises UserError naming the folder when it cannot be written; nothing half-written stays.
    """
    path = folder / f"step-{state['step']:08d}"
    partial = path.with_name(path.name + ".partial")
    states: list[dict | None] = [None] * dist.get_world_size()
    dist.all_gather_object(states, stream_state["streams"])
    streams = {number: state for part in states for number, state in part.items()}
    state = {**state, "data": {**stream_state, "streams": streams}}
    with together():
        if dist.get_rank() == 0:
            with _named(path):
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
                (partial / "state.json").write_text(json.dumps(state))
    try:
        with together(), _named(path):
            dcp.save(_tensors(engine, ema), checkpoint_id=partial / "tensors")
        with together():
            if dist.get_rank() == 0:
                with _named(path):
                    _publish(partial, path)
                    for old in complete_checkpoints(folder)[:-keep_last]:
                        shutil.rmtree(old)
    finally:
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
    return path


def load_checkpoint(path: Path, engine: DeepSpeedEngine, ema: Ema) -> dict:
    """Put weights, moments and averages in place; returns the plain state (step, data)."""
    with together():
        if dist.get_rank() == 0:
            verify_checkpoint(path)
    state = json.loads((path / "state.json").read_text())
    _materialize_moments(engine, state["step"])
    tensors = _tensors(engine, ema)
    _read_tensors(path, tensors)
    for name, parameter in engine.module.named_parameters():
        safe_set_full_fp32_param(parameter, tensors[f"model.{name}"])
        parameter.data.copy_(tensors[f"model.{name}"])
        for moment in MOMENTS:
            safe_set_full_optimizer_state(parameter, tensors[f"{moment}.{name}"], moment)
    return state


def load_ema(path: Path, names_and_shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """The averaged weights of a checkpoint alone, in one process and without an engine."""
    verify_checkpoint(path)
    tensors = {f"ema.{name}": torch.empty(shape) for name, shape in names_and_shapes.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as it is meant to be
        _read_tensors(path, tensors, no_dist=True)
    return {name: tensors[f"ema.{name}"] for name in names_and_shapes}


def complete_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints of a run, oldest first."""
    return sorted(p for p in folder.glob("step-*") if p.suffix != ".partial" and (p / MANIFEST).is_file())


def verify_checkpoint(path: Path) -> None:
    """Raise UserError naming the file that is missing or not as it was written."""
    way_out = f"delete {path} to go on from the checkpoint before"
    if not (path / MANIFEST).is_file():
        raise UserError(f"{path}: no {MANIFEST}, so no complete checkpoint; {way_out}")
    try:
        files = json.loads((path / MANIFEST).read_text())["files"]
        written = {path / name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path / MANIFEST}: not readable ({error}); {way_out}") from error
    for file, (num_bytes, sha256) in written.items():
        if not file.is_file():
            raise UserError(f"{file}: missing from the checkpoint; {way_out}")
        if file.stat().st_size != num_bytes or file_sha256(file) != sha256:
            raise UserError(f"{file}: not as it was written; {way_out}")


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """What the disk refuses, as a UserError that names the checkpoint."""
    try:
        yield
    except (OSError, dcp.api.CheckpointException) as error:
        raise UserError(
            f"{path}: cannot write the checkpoint ({_reason(error)}); free space and start again: the run "
            "resumes from the checkpoint before"
        ) from error


def _publish(partial: Path, path: Path) -> None:
    files = {
        str(file.relative_to(partial)): {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
        for file in sorted(partial.rglob("*"))
        if file.is_file()
    }
    with (partial / MANIFEST).open("w") as manifest:
        json.dump({"format": "megafusion-checkpoint/1", "files": files}, manifest, indent=1)
        manifest.flush()
        os.fsync(manifest.fileno())
    shutil.rmtree(path, ignore_errors=True)
    partial.rename(path)


def _read_tensors(path: Path, tensors: dict[str, Tensor], no_dist: bool = False) -> None:
    """Fill tensors by name. UserError where the checkpoint holds others, or is not one of ours."""
    reader = Reader(path / "tensors")
    reader.read_metadata()  # once by itself, for torch would wrap what it refuses
    try:
        dcp.load(tensors, storage_reader=reader, no_dist=no_dist)
    except dcp.api.CheckpointException as error:
        raise UserError(
            f"{path}: does not hold the tensors of this model ({_reason(error)}); delete it to go on from "
            "the checkpoint before"
        ) from error


def _tensors(engine: DeepSpeedEngine, ema: Ema) -> dict[str, Tensor]:
    """Every tensor of the run under its canonical name, whole on every rank."""
    _link_moments(engine)
    tensors = {}
    for name, parameter in engine.module.named_parameters():
        tensors[f"model.{name}"] = safe_get_full_fp32_param(parameter).detach()
        tensors[f"ema.{name}"] = ema.weights[name]
        for moment in MOMENTS:
            tensors[f"{moment}.{name}"] = safe_get_full_optimizer_state(parameter, moment)
    return tensors


def _link_moments(engine: DeepSpeedEngine) -> None:
    """DeepSpeed links parameters to their moments once, before the second group has any; link anew."""
    engine.optimizer._hp_optimizer_states_linked = False
    engine.optimizer._lazy_init_hp_params_optimizer_state()


def _materialize_moments(engine: DeepSpeedEngine, step: int) -> None:
    """Give a fresh AdamW the state that it would make at its first step, at a chosen step."""
    optimizer = engine.optimizer.optimizer
    for group in optimizer.param_groups:
        for partition in group["params"]:
            optimizer.state[partition] = {
                "step": torch.tensor(float(step), device=partition.device),
                **{moment: torch.zeros_like(partition) for moment in MOMENTS},
            }


def _reason(error: BaseException) -> str:
    """The innermost cause in words: torch wraps the disk's answer in its own report."""
    if isinstance(error, dcp.api.CheckpointException):
        return "; ".join(str(failure[0]) for failure in error.failures.values())
    return getattr(error, "strerror", None) or str(error)
