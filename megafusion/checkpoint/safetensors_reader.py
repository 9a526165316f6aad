"""Reads safetensors, sharded or not, of which each rank takes the chunks that it needs."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megafusion.checkpoint.chunks import Chunk, Chunks
from megafusion.errors import UserError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def open_safetensors(folder: Path) -> dict[str, Any]:
    """The tensors of a folder by name, as safetensors' lazy slices. UserError naming a file that is bad."""
    files, listed = [WEIGHTS], None
    if (folder / INDEX).is_file():
        try:
            listed = dict(json.loads((folder / INDEX).read_text())["weight_map"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder / INDEX}: damaged ({error}); fetch it again") from error
        files = sorted(set(listed.values()))
    elif not (folder / WEIGHTS).is_file():
        raise UserError(f"{folder}: no {WEIGHTS} and no {INDEX}{_pickles(folder)}")
    tensors: dict[str, Any] = {}
    for name in files:
        try:
            file = safe_open(folder / name, "pt")
        except FileNotFoundError as error:
            raise UserError(f"{folder / name}: missing, but {INDEX} names it; fetch it again") from error
        except (SafetensorError, OSError) as error:
            raise UserError(f"{folder / name}: truncated or damaged ({error}); fetch it again") from error
        tensors |= {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    if missing := sorted(set(listed or ()) - tensors.keys()):
        raise UserError(f"{folder}: {missing[0]} is in {INDEX}, but in none of its files; fetch them again")
    return tensors


def _pickles(folder: Path) -> str:
    if not any(file.suffix in (".bin", ".pt", ".pth") for file in folder.iterdir()):
        return ", so it holds no weights; name a folder of safetensors"
    load = f"AutoModelForCausalLM.from_pretrained('{folder}').save_pretrained('{folder}-safetensors')"
    return (
        ": its weights are pickles, which can run code and are never loaded; convert what you trust: "
        f'python -c "from transformers import AutoModelForCausalLM; {load}"'
    )


class SafetensorsWeights:
    """A TensorSource whose tensors each consist of stored ones, along dimension 0.

    parts: lazy slices of `open_safetensors` by the name of the tensor that they make up.
    """

    def __init__(self, folder: Path, parts: Mapping[str, Sequence[Any]]):
        self._folder, self._parts = folder, parts

    def __str__(self) -> str:
        return str(self._folder)

    def shapes(self) -> dict[str, torch.Size]:
        found = {name: [part.get_shape() for part in parts] for name, parts in self._parts.items()}
        return {
            name: torch.Size([sum(shape[0] for shape in shapes), *shapes[0][1:]])
            for name, shapes in found.items()
        }

    def read(self, chunks: dict[str, Chunks]) -> None:
        for name, part in chunks.items():
            for chunk in part.chunks:
                self._fill(chunk, self._parts[name])

    def _fill(self, chunk: Chunk, parts: Sequence[Any]) -> None:
        (begin, *offsets), (rows, *sizes) = chunk.offsets, chunk.values.shape
        columns = tuple(slice(offset, offset + size) for offset, size in zip(offsets, sizes, strict=True))
        first = 0
        for part in parts:
            stop = first + part.get_shape()[0]
            low, high = max(begin, first), min(begin + rows, stop)
            if low < high:
                values = part[(slice(low - first, high - first), *columns)]
                chunk.values[low - begin : high - begin].copy_(values)
            first = stop
