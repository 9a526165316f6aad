"""Checkpoint of an unfinished training: weights, averages, optimizers and random state, without pickle."""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from megafusion.errors import UserError, refuse_os_errors

CHECKPOINT_NAME = "state.safetensors"


def save_checkpoint(
    folder: Path,
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, torch.optim.Optimizer],
    meta: dict,
) -> None:
    """Write everything that the next step depends on, atomically."""
    tensors = {
        f"{kind}/{name}": value.detach().cpu().contiguous()
        for kind, states in (("module", modules), ("optimizer", optimizers))
        for owner, thing in states.items()
        for name, value in _tensors(owner, thing)
    }
    tensors["random/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random/cuda"] = torch.cuda.get_rng_state()
    temporary = folder / f".{CHECKPOINT_NAME}.new"
    with refuse_os_errors(f"{folder}: cannot be written", "; free space: the same command resumes"):
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporary, {"meta": json.dumps(meta)})
        temporary.replace(folder / CHECKPOINT_NAME)


def read_meta(folder: Path) -> dict | None:
    """Metadata of the checkpoint in `folder`; None where there is none."""
    path = folder / CHECKPOINT_NAME
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            return json.loads(file.metadata()["meta"])
    except (SafetensorError, OSError, TypeError, KeyError, ValueError) as error:
        raise UserError(f"{path}: not readable ({error}); delete {folder} to start over") from error


def load_checkpoint(
    folder: Path, modules: Mapping[str, nn.Module], optimizers: Mapping[str, torch.optim.Optimizer]
) -> None:
    """Load modules and optimizers of the same shapes, and the random state."""
    with safe_open(folder / CHECKPOINT_NAME, "pt") as file:
        names = set(file.keys())
        for owner, module in modules.items():
            prefix = f"module/{owner}/"
            own = {n.removeprefix(prefix): file.get_tensor(n) for n in names if n.startswith(prefix)}
            module.load_state_dict(own)
        for owner, optimizer in optimizers.items():
            prefix = f"optimizer/{owner}/"
            state: dict[int, dict[str, Tensor]] = {}
            for name in (n for n in names if n.startswith(prefix)):
                index, key = name.removeprefix(prefix).split("/")
                state.setdefault(int(index), {})[key] = file.get_tensor(name)
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": state, "param_groups": groups})
        torch.set_rng_state(file.get_tensor("random/cpu"))
        if "random/cuda" in names and torch.cuda.is_available():
            torch.cuda.set_rng_state(file.get_tensor("random/cuda"))


def remove_checkpoint(folder: Path) -> None:
    """Remove the checkpoint."""
    shutil.rmtree(folder, ignore_errors=True)


def _tensors(owner: str, thing: nn.Module | torch.optim.Optimizer) -> Iterator[tuple[str, Any]]:
    if isinstance(thing, nn.Module):
        for name, value in thing.state_dict().items():
            yield f"{owner}/{name}", value
    else:
        for index, values in thing.state_dict()["state"].items():
            for key, value in values.items():
                yield f"{owner}/{index}/{key}", value
