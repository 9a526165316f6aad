"""Rectified flow (Liu et al., arXiv 2209.03003), by diffusers' flow-matching schedulers.

Imports neither torch nor diffusers, as ddpm.py.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from megafusion.config import Config
from megafusion.errors import UserError
from megafusion.objective.sampler import (
    Sampler,
    SamplerOptions,
    end_at_data,
    make_scheduler,
    unsupported_sampler,
)

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from megafusion.objective.config import SamplingConfig

SAMPLERS: dict[str, SamplerOptions] = {
    "euler": {"scheduler": "FlowMatchEulerDiscrete"},
    "heun": {"scheduler": "FlowMatchHeunDiscrete"},
    "dpm++": {"scheduler": "DPMSolverMultistep"},
    "DPMSolverMultistep": {"scheduler": "DPMSolverMultistep"},
    "FlowMatchEulerDiscrete": {"scheduler": "FlowMatchEulerDiscrete"},
    "FlowMatchHeunDiscrete": {"scheduler": "FlowMatchHeunDiscrete"},
    "UniPCMultistep": {"scheduler": "UniPCMultistep"},
}
"""By the names of `sampling.sampler`: diffusers' schedulers of this process."""
NUM_TIMESTEPS = 1000
"""Unit of the timestep embedding's input: t = 1 is 1000, as in diffusers' flow-matching schedulers."""
MIN_DIVISOR = 0.05
"""Least t or 1 - t in the weight of the loss (JiT, arXiv 2511.13720)."""
MAX_T = 1 - 2**-24
"""The largest float32 below 1."""


class FlowConfig(Config):
    """Straight paths from data to noise, how t is sampled in training, and the model's prediction."""

    kind: Literal["flow"] = "flow"
    """Rectified flow: x_t = (1 - t) x_0 + t noise."""
    prediction_type: Literal["velocity", "epsilon", "sample"] = "velocity"
    """The model's prediction: velocity, noise - x_0; epsilon, the noise; sample, x_0 (JiT, arXiv 2511.13720).
    The loss is the velocity's squared error for each: with sample an error weighs 1 / t^2, and uniform times
    did not learn (docs/recipe.md)."""
    t_distribution: Literal["uniform", "logit_normal"] = "uniform"
    """Distribution of t in training, before the shift; logit_normal as in arXiv 2403.03206."""
    logit_mean: float = 0.0
    """Mean of logit(t) with logit_normal; negative for more of the low noise. A mean and a deviation of 0.8,
    as JiT's, measured best here."""
    logit_std: float = Field(1.0, gt=0)
    """Standard deviation of logit(t) with logit_normal."""
    shift: float = Field(1.0, gt=0)
    """Shift of t towards noise, in training and in sampling: shift t / (1 + (shift - 1) t), as in arXiv
    2403.03206; larger images need more, the square root of the ratio of their areas."""

    def build(self) -> Flow:
        """The process that these values describe."""
        return Flow(self)


class Flow:
    """x_t = (1 - t) x_0 + t noise, with the velocity noise - x_0."""

    samplers = SAMPLERS

    def __init__(self, config: FlowConfig):
        self.config = config

    def sample_t(self, generator: np.random.Generator, max_t: float) -> float:
        """A t of the distribution cut off at max_t, by its quantile function: one number of the generator."""
        config, u = self.config, generator.random()
        limit = max_t / (config.shift - (config.shift - 1) * max_t)  # before the shift
        if config.t_distribution == "uniform":
            t = u * limit
        else:
            logit = NormalDist(config.logit_mean, config.logit_std)
            below = logit.cdf(math.log(limit / (1 - limit))) if 0 < limit < 1 else float(limit >= 1)
            quantile = logit.inv_cdf(min(max(u * below, 1e-300), MAX_T))
            t = min(1 / (1 + math.exp(-quantile)), limit)
        return min(config.shift * t / (1 + (config.shift - 1) * t), MAX_T)

    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Noised latents [..., C, H, W] at times [...]."""
        t = t[..., None, None, None]
        return (1 - t) * latents + t * noise

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """noise - x_0, the noise, or x_0."""
        return {"velocity": noise - latents, "epsilon": noise, "sample": latents}[self.config.prediction_type]

    def loss_weight(self, t: Tensor) -> Tensor | None:
        """Squared error of the velocity over that of the prediction, at times [...]; None for 1."""
        if self.config.prediction_type == "velocity":
            return None
        divisor = t if self.config.prediction_type == "sample" else 1 - t
        return divisor.clamp(min=MIN_DIVISOR) ** -2

    def timesteps(self, t: Tensor) -> Tensor:
        """1000 t, float32."""
        return t * NUM_TIMESTEPS

    def clean(self, prediction: Tensor, noised: Tensor, t: Tensor) -> Tensor:
        """The x_0 that a prediction at noised latents [..., C, H, W] and times [...] means."""
        return noised - t.to(noised.device)[..., None, None, None] * self.velocity(prediction, noised, t)

    def sampler(self, sampling: SamplingConfig) -> Sampler:
        """A scheduler over n equal steps from t = 1 to 0, before the shift."""
        import torch

        if reason := self.unsupported_reason(sampling):
            raise UserError(reason)
        steps, shift = sampling.num_inference_steps, self.config.shift
        made = make_scheduler(
            SAMPLERS[sampling.sampler or "euler"],
            num_train_timesteps=NUM_TIMESTEPS,
            shift=shift,
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
        )
        # diffusers' last step is from 1 / 1000, for any n: one step in n does nothing.
        made.sigma_min = 1 / steps
        made.set_timesteps(steps)
        timesteps = made.timesteps
        if "use_flow_sigmas" in made.config:  # its own grid is another, and its timesteps are rounded
            u = torch.arange(steps, 0, -1) / steps
            # Not 1, whose logarithm of signal to noise is not finite.
            t = (shift * u / (1 + (shift - 1) * u)).clamp(max=1 - 1e-6)
            made.sigmas, timesteps = torch.cat([t, torch.zeros(1)]), t * NUM_TIMESTEPS
        end_at_data(made)
        return Sampler(
            made,
            timesteps,
            timesteps / NUM_TIMESTEPS,
            lambda prediction, latents, timestep: self.velocity(
                prediction, latents, timestep / NUM_TIMESTEPS
            ),
        )

    def unsupported_reason(self, sampling: SamplingConfig) -> str | None:
        """The samplers of denoising diffusion do not follow a flow."""
        return unsupported_sampler(sampling.sampler, SAMPLERS, "flow")

    def velocity(self, prediction: Tensor, noised: Tensor, t: Tensor) -> Tensor:
        """The velocity at noised latents [..., C, H, W] and times [...] above 0 that a prediction means."""
        t = t.to(noised.device)[..., None, None, None]  # diffusers' timesteps are on the CPU
        if self.config.prediction_type == "sample":
            return (noised - prediction) / t
        if self.config.prediction_type == "epsilon":  # says nothing of the velocity at t = 1
            return (prediction - noised) / (1 - t).clamp(min=MIN_DIVISOR)
        return prediction
