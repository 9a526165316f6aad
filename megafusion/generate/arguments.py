"""Arguments of a pipeline's calls, checked before anything is generated."""

from collections.abc import Iterable, Sequence
from operator import index
from pathlib import Path
from typing import Any, get_args

import torch
from PIL import Image
from torch import Tensor

from megafusion.errors import UserError
from megafusion.generate.row import Begin, Part
from megafusion.images.reader import load_image

MAX_SEED = 2**63 - 1
IMAGE_KINDS = (Image.Image, str, Path)
PART_KINDS = (str, Path, Image.Image)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def as_list(given: Any, kinds: tuple[type, ...], call: str) -> list:
    """The parts of a list. Raises UserError for others, and for a string, which is a list of letters."""
    parts = list(given) if isinstance(given, Iterable) and not isinstance(given, str) else [None]
    if not all(isinstance(part, kinds) for part in parts):
        names = " or ".join(kind.__name__ for kind in kinds)
        raise UserError(f"expected a list of {names}, got {given!r:.80}; call it as {call}")
    return parts


def one_or_list(given: Any, kinds: tuple[type, ...], call: str) -> list:
    """The parts of a list, or one part alone. Raises UserError for others."""
    return [given] if isinstance(given, kinds) else as_list(given, kinds, call)


def as_integer(name: str, value: Any, least: int, most: int) -> int:
    """An integer of Python or NumPy within bounds. Raises UserError for anything else."""
    try:
        if least <= index(value) <= most:
            return index(value)
    except TypeError:
        pass
    raise UserError(f"{name}={value!r:.80}: give an integer from {least} to {most}")


def as_seeds(seed: Any, num_rows: int) -> list[int]:
    """One seed a row: of a list, or seed + r for the r-th."""
    if isinstance(seed, list | tuple):
        if len(seed) != num_rows:
            raise UserError(
                f"seed has {len(seed)} values for {num_rows} prompts; give one each, or an integer"
            )
        return [as_integer("seed", each, 0, MAX_SEED) for each in seed]
    first = as_integer("seed", seed, 0, MAX_SEED)
    return [(first + row) % 2**64 for row in range(num_rows)]


def as_begin(begin: Any) -> Begin:
    """One of the ways to begin an answer."""
    if begin not in get_args(Begin):
        raise UserError(f"begin={begin!r}: give one of {', '.join(map(repr, get_args(Begin)))}")
    return begin


def as_image(image: Any, name: str = "image") -> Image.Image:
    """A PIL image, or the image at a path. Raises UserError with the limit for one that cannot be used."""
    if isinstance(image, str | Path):
        return load_image(image)
    if not isinstance(image, Image.Image):
        raise UserError(f"{name}={image!r:.80}: give a PIL image or the path of one")
    most = Image.MAX_IMAGE_PIXELS or 2**31
    if not 0 < image.width * image.height <= most:
        raise UserError(
            f"{name} of {image.height} x {image.width} pixels: give 1 to {most} pixels; resize it"
        )
    return image


def as_documents(prompts: Any, call: str) -> list[list[Part]]:
    """Documents of texts and images, or one part as a document of its own; a Path is an image's."""
    prompts = [[prompts]] if isinstance(prompts, PART_KINDS) else prompts
    documents = [as_list(prompt, PART_KINDS, call) for prompt in as_list(prompts, (list, tuple), call)]
    return [
        [part if isinstance(part, str) else as_image(part) for part in document] for document in documents
    ]


def as_latents(changed: Any, latents: Tensor) -> Tensor:
    """The latents that a callback at a step's end returns; those given where it returns none."""
    found = changed.get("latents", latents) if isinstance(changed, dict) else latents
    if not isinstance(found, Tensor) or found.shape != latents.shape:
        raise UserError(f"callback_on_step_end: latents are not a tensor of shape {list(latents.shape)}")
    return found.to(latents)


def as_dtype(dtype: Any) -> torch.dtype:
    """A dtype of weights, or its name."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in DTYPES:
        raise UserError(f"torch_dtype={dtype!r}: give one of {', '.join(map(str, DTYPES))}")
    return found


def one_or_each(name: str, value: Any, kind: type | tuple[type, ...], num: int) -> Sequence[Any]:
    """A value for each of so many rows: one for all, or a list of one each."""
    values = value if isinstance(value, list | tuple) else [value] * num
    if len(values) != num or not all(isinstance(each, kind) for each in values):
        names = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise UserError(f"{name}={value!r:.80}: give a {names}, or a list of {num}, one for each prompt")
    return values
