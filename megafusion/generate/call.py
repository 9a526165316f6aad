"""A pipeline called as one of diffusers: its arguments as requests, its steps, its kinds of output."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from megafusion.errors import UserError
from megafusion.generate import arguments as given
from megafusion.generate.events import ImageStep
from megafusion.generate.generation import Generation
from megafusion.generate.row import Part, Request
from megafusion.images.sizes import format_sizes

if TYPE_CHECKING:
    from megafusion.generate.pipeline import TransfusionPipeline

OutputType = Literal["pil", "np", "pt", "latent"]
CALLBACK_TENSOR_INPUTS = ("latents",)
"""Tensors that callback_on_step_end can ask for."""
MAX_IMAGES_PER_PROMPT = 1024


@dataclass(frozen=True)
class TransfusionPipelineOutput:
    """images: a list of PIL images; or, by output_type: np, float32 [N, H, W, 3] in [0, 1]; pt, the same as a
    tensor [N, 3, H, W]; latent, normalized latents [N, C, h, w]. Those need images of one size."""

    images: Any


def call_requests(
    pipeline: "TransfusionPipeline",
    prompt: Any,
    image: Any,
    size: Any,
    num_images_per_prompt: Any,
    generator: Any,
    latents: Any,
    negative_prompt: Any,
    sampling: Any,
    changes: dict[str, Any],
) -> list[Request]:
    """A request for each image; see `TransfusionPipeline.__call__`. size: its height and width.

    changes: of the sampling, those that are not None. Raises UserError for an argument that cannot be used.
    """
    call = 'pipeline("a prompt"), or pipeline.generate([["text", image, ...]]) for answers of any kind'
    prompts = given.one_or_list(prompt, (str,), call)
    if empty := [number for number, text in enumerate(prompts) if not text.strip()]:
        raise UserError(f"prompt {empty[0]} is empty; give a text, or call draw to draw without one")
    copies = given.as_integer("num_images_per_prompt", num_images_per_prompt, 1, MAX_IMAGES_PER_PROMPT)
    documents: list[list[Part]] = [[text] for text in prompts]
    if image is not None:
        images = given.one_or_each("image", image, given.IMAGE_KINDS, len(prompts))
        documents = [[given.as_image(each), text] for each, text in zip(images, prompts, strict=True)]
    samplings = pipeline.samplings(sampling, len(prompts), max_new_tokens=0, **changes)
    if negative_prompt is not None:
        texts = given.one_or_each("negative_prompt", negative_prompt, str, len(prompts))
        samplings = [
            each.model_copy(update={"negative_prompt": text})
            for each, text in zip(samplings, texts, strict=True)
        ]
    num = len(prompts) * copies
    noise: Sequence[Any] = [None] * num
    if generator is not None:
        noise = given.one_or_each("generator", generator, torch.Generator, num)
    seeds = torch.randint(given.MAX_SEED, (num,)).tolist() if generator is None else [0] * num
    index = _size_index(pipeline, *size)
    starts: Sequence[Any] = [None] * num
    if latents is not None:
        index, starts = _as_starts(pipeline, latents, index, num)
    return [
        Request(
            documents[i // copies], samplings[i // copies], seeds[i], "image", 1, index, noise[i], starts[i]
        )
        for i in range(num)
    ]


def _size_index(pipeline: "TransfusionPipeline", height: Any, width: Any) -> int | None:
    """Index of the size of a height and a width, or of the one of them that is given; None for neither."""
    if height is None and width is None:
        return None
    if height is not None and width is not None:
        return pipeline.size_index((height, width))
    name, side, axis = ("width", width, 1) if height is None else ("height", height, 0)
    found = [size for size in pipeline.sizes if size[axis] == side]
    if len(found) == 1:
        return pipeline.size_index(found[0])
    raise UserError(
        f"{name}={side!r:.80}: the model has {format_sizes(found or pipeline.sizes)} (height x width, in "
        f"pixels); {'give height and width' if found else 'choose one of these'}"
    )


def _as_starts(
    pipeline: "TransfusionPipeline", latents: Any, index: int | None, num: int
) -> tuple[int, Sequence[Any]]:
    """The index of the size of latents [N, C, h, w], and the latents of each image."""
    model = pipeline.config.model
    if model.codebook_size:
        raise UserError("latents: the model draws codes, which start from no noise; leave it out")
    known = model.latent_sizes if index is None else [model.latent_sizes[index]]
    shapes = [[num, model.latent_channels, *size] for size in known]
    if not isinstance(latents, Tensor) or list(latents.shape) not in shapes:
        found = list(latents.shape) if isinstance(latents, Tensor) else f"{latents!r:.80}"
        raise UserError(f"latents: give a tensor of shape {' or '.join(map(str, shapes))} (got {found})")
    if not latents.isfinite().all():
        raise UserError("latents: has numbers that are not finite; give unit normal noise")
    return model.latent_sizes.index(tuple(latents.shape[2:])), list(latents.detach().float().cpu())


def run_steps(
    pipeline: "TransfusionPipeline", generation: Generation, callback: Callable[..., Any] | None, inputs: Any
) -> dict[int, Tensor]:
    """Draw the images of a generation, with a callback after each step; the last latents of each row.

    inputs: names of the tensors that the callback is given.
    """
    latents: dict[int, Tensor] = {}
    for event in generation:
        if isinstance(event, ImageStep):
            state = event.state
            if callback and not pipeline.interrupt:
                now = {"latents": state.latents} if inputs else {}
                changed = callback(pipeline, state.step - 1, state.timestep, now)
                state.latents = given.as_latents(changed, state.latents)
            if pipeline.interrupt:
                generation.interrupt()
            latents.update(zip(event.rows, state.latents, strict=True))
    return latents


def check_output_type(output_type: Any) -> None:
    """Raise UserError for an output_type that does not exist."""
    if output_type not in get_args(OutputType):
        raise UserError(f"output_type={output_type!r}: give one of {', '.join(get_args(OutputType))}")


def check_tensor_inputs(names: Any) -> None:
    """Raise UserError for a name of a tensor that a callback at a step's end is not given."""
    if not isinstance(names, list | tuple) or set(names) - set(CALLBACK_TENSOR_INPUTS):
        raise UserError(
            f"callback_on_step_end_tensor_inputs={names!r:.80}: give a list of names, of "
            f"{', '.join(CALLBACK_TENSOR_INPUTS)}"
        )


def as_images(
    pipeline: "TransfusionPipeline", drawn: list[Image.Image], latents: list[Tensor], output_type: OutputType
) -> list[Image.Image] | Tensor | np.ndarray:
    """Drawn images, or their latents, in a form of output_type; see `TransfusionPipelineOutput`."""
    if output_type == "pil":
        return drawn
    if len({each.shape for each in latents}) > 1:
        raise UserError(f"output_type={output_type}: the images have several sizes; give height and width")
    stacked = torch.stack(latents)
    if output_type == "latent":
        return stacked
    codec = pipeline.codec
    pixels = codec.decode(codec.denormalize(stacked)).float() / 2 + 0.5
    return pixels if output_type == "pt" else pixels.permute(0, 2, 3, 1).cpu().numpy()
