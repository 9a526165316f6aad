"""The sidebar: how images and text are sampled, and its values as a request's options."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from megafusion.errors import UserError
from megafusion.images.sizes import Size, parse_size
from megafusion.objective.config import SamplingConfig
from megafusion.serve.bodies import check_sampler, limited
from megafusion.serve.worker import Worker

ANY_SIZE = "the model's choice"
MAX_SEED = 2**31 - 1
"""A browser has exact integers up to 2^53."""
RANDOM_SEEDS = 1_000_000
"""Few enough that a seed can be read out."""
NUM_PREVIEWS = 12


@dataclass(frozen=True)
class Options:
    """Values of the sidebar."""

    sampling: SamplingConfig
    seed: int
    size: Size | None

    @property
    def preview_every(self) -> int:
        """Denoising steps between previews."""
        return max(1, self.sampling.num_inference_steps // NUM_PREVIEWS)


class Settings:
    """The components, laid out in the layout that is open. inputs: in the order that `read` takes."""

    def __init__(self, worker: Worker):
        self.worker, limits = worker, worker.config
        self.own = own = limited(worker.pipeline.config.sampling, limits)
        most_steps = max(own.num_inference_steps, min(limits.max_steps, 100))
        sizes = [f"{height}x{width}" for height, width in worker.pipeline.sizes]
        guidance = gr.Slider(0, 15, own.guidance_scale, step=0.1, label="Guidance", info="1 turns it off")
        steps = gr.Slider(1, most_steps, own.num_inference_steps, step=1, label="Steps", info="of denoising")
        self.size = gr.Dropdown(
            [ANY_SIZE, *sizes],
            value=ANY_SIZE,
            label="Size",
            info="height x width in pixels",
            visible=len(sizes) > 1,
        )
        with gr.Group():
            self.seed = gr.Number(0, label="Seed", precision=0, info="the same seed gives the same answer")
            self.is_random = gr.Checkbox(True, label="a new seed each time")
        temperature = gr.Slider(
            0, 2, own.temperature, step=0.05, label="Temperature", info="of text; 0: the likeliest"
        )
        with gr.Accordion("More", open=False):
            samplers = list(worker.pipeline.model.objective.noise_process.samplers)
            sampler = gr.Dropdown(samplers, value=own.sampler, label="Sampler")
            negative = gr.Textbox(
                own.negative_prompt, label="Negative prompt", info="what guidance leads away from"
            )
            image_guidance = gr.Number(
                own.image_guidance_scale,
                label="Guidance on the image",
                info="of edits; if empty, guidance is on both",
            )
            top_p = gr.Slider(0.05, 1, own.top_p, step=0.05, label="Top p", info="of text")
            tokens = gr.Number(own.max_new_tokens, label="Longest text", precision=0, info="in tokens")
        self.keys = {
            "guidance_scale": guidance,
            "num_inference_steps": steps,
            "sampler": sampler,
            "negative_prompt": negative,
            "image_guidance_scale": image_guidance,
            "temperature": temperature,
            "top_p": top_p,
            "max_new_tokens": tokens,
        }
        self.inputs = [*self.keys.values(), self.size, self.seed, self.is_random]

    def read(self, values: Sequence[Any]) -> Options:
        """Values of `inputs`, checked; where one is empty, the model's own. Raises UserError."""
        *given, size, seed, is_random = values
        changes = {key: value for key, value in zip(self.keys, given, strict=True) if value is not None}
        check_sampler(self.worker.pipeline, changes.get("sampler"))
        sampling = self.own.model_copy(update=changes)
        limits = self.worker.config
        most = {"num_inference_steps": limits.max_steps, "max_new_tokens": limits.max_tokens}
        for key, limit in most.items():
            if (value := getattr(sampling, key)) > limit:
                raise UserError(f"{self.keys[key].label} of {value}: at most {limit} are allowed")
        if is_random:
            seed = random.randrange(RANDOM_SEEDS)
        elif not isinstance(seed, int) or not 0 <= seed <= MAX_SEED:
            raise UserError(f"Seed {seed!r:.40}: give an integer from 0 to {MAX_SEED}")
        return Options(sampling, seed, None if size == ANY_SIZE else parse_size(str(size), "Size"))
