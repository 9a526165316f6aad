"""Checkpoint of an unfinished training: weights, averages, optimizers and random state, without pickle."""

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
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
    tensors = {"random/cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["random/cuda"] = torch.cuda.get_rng_state()
    for owner, module in modules.items():
        tensors |= {f"module/{owner}/{name}": value for name, value in module.state_dict().items()}
    for owner, optimizer in optimizers.items():
        for index, values in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{owner}/{index}/{key}": value for key, value in values.items()}
    temporary = folder / f".{CHECKPOINT_NAME}.new"
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with refuse_os_errors(f"{folder}: cannot be written", "; free space: the same command resumes"):
        folder.mkdir(parents=True, exist_ok=True)
        save_file(contiguous, temporary, {"meta": json.dumps(meta)})
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
    tensors = load_file(folder / CHECKPOINT_NAME)
    for owner, module in modules.items():
        module.load_state_dict(_below(f"module/{owner}/", tensors))
    for owner, optimizer in optimizers.items():
        state: dict[int, dict[str, Tensor]] = defaultdict(dict)
        for name, tensor in _below(f"optimizer/{owner}/", tensors).items():
            index, key = name.split("/")
            state[int(index)][key] = tensor
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    torch.set_rng_state(tensors["random/cpu"])
    if "random/cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random/cuda"])


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, named without it."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
