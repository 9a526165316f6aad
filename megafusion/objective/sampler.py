"""The reverse of a noise process: the sampler that generation calls, and classifier-free guidance."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Sampler(Protocol):
    """The part of a diffusers scheduler that generation calls; latents start as unit normal noise."""

    timesteps: Tensor
    """The timestep embedding's input at each step, [num_inference_steps]."""

    def step(self, prediction: Tensor, timestep: Tensor, latents: Tensor) -> Any:
        """An object whose `prev_sample` is the latents after a step."""


def apply_guidance(conditional: Tensor, unconditional: Tensor, guidance_scale: float) -> Tensor:
    """unconditional + guidance_scale (conditional - unconditional) (Ho and Salimans, arXiv 2207.12598)."""
    return unconditional + guidance_scale * (conditional - unconditional)
