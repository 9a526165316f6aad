"""Sampling of images: diffusers' samplers, their steps, classifier-free guidance."""

from typing import Any, ClassVar, Literal, Protocol

from pydantic import Field
from torch import Tensor

from megafusion.config import Config


class SamplingConfig(Config):
    """Sampler of images; text is decoded greedily."""

    renamed_keys: ClassVar[dict[str, str]] = {
        "guidance": "guidance_scale",
        "num_steps": "num_inference_steps",
    }

    sampler: Literal["ddim", "dpm++"] = "ddim"
    """DDIM (arXiv 2010.02502), or second-order DPM-Solver++ (arXiv 2211.01095)."""
    num_inference_steps: int = Field(250, gt=0)
    """Denoising steps; DPM-Solver++ needs about a tenth of DDIM's."""
    guidance_scale: float = Field(3.0, ge=0)
    """Classifier-free guidance (arXiv 2207.12598); 1 turns it off."""
    max_new_tokens: int = Field(128, ge=0)
    """Maximum text tokens in an answer."""


class Sampler(Protocol):
    """The part of a diffusers scheduler that generation calls; latents start as unit normal noise."""

    timesteps: Tensor
    """The timestep embedding's input at each step, [num_inference_steps]."""

    def step(self, prediction: Tensor, timestep: Tensor, latents: Tensor) -> Any:
        """An object whose `prev_sample` is the latents after a step."""


def apply_guidance(conditional: Tensor, unconditional: Tensor, guidance_scale: float) -> Tensor:
    """unconditional + guidance_scale (conditional - unconditional) (Ho and Salimans, arXiv 2207.12598)."""
    return unconditional + guidance_scale * (conditional - unconditional)
