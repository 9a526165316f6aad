"""Denoising diffusion in discrete timesteps (Ho et al., arXiv 2006.11239), by diffusers' schedulers.

Imports neither torch nor diffusers: configurations, and processes that only sample t, start without them.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

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
    import torch
    from diffusers import DDPMScheduler
    from torch import Tensor

    from megafusion.objective.config import SamplingConfig

SAMPLERS: dict[str, SamplerOptions] = {
    # DDIM is DPM-Solver++ of order 1 (arXiv 2211.01095), so one scheduler runs both.
    "ddim": {"scheduler": "DPMSolverMultistep", "solver_order": 1},
    "dpm++": {"scheduler": "DPMSolverMultistep"},
    "euler": {"scheduler": "EulerDiscrete"},
    "DDIM": {"scheduler": "DPMSolverMultistep", "solver_order": 1},
    "DDPM": {"scheduler": "DDPM", "clip_sample": False},
    "DEISMultistep": {"scheduler": "DEISMultistep"},
    "DPMSolverMultistep": {"scheduler": "DPMSolverMultistep"},
    "EulerAncestralDiscrete": {"scheduler": "EulerAncestralDiscrete", "float64_sigmas": True},
    "EulerDiscrete": {"scheduler": "EulerDiscrete"},
    "LMSDiscrete": {"scheduler": "LMSDiscrete"},
    "UniPCMultistep": {"scheduler": "UniPCMultistep"},
}
"""By the names of `sampling.sampler`: diffusers' schedulers that sample this process, better with every step
more. Left out: those for other models (LCM and TCD for distilled ones, EDM), and those that the cosine
schedule's first step, from a noise of 20,000 times the signal, leads astray at usual numbers of steps (Heun,
PNDM, KDPM2Ancestral, SASolver) or that an even number of steps suits less (DPMSolverSinglestep, KDPM2)."""


class DDPMConfig(Config):
    """Noise schedule and prediction type; the keys are those of diffusers' DDPMScheduler."""

    renamed_keys: ClassVar[dict[str, str]] = {
        "num_steps": "num_train_timesteps",
        "prediction": "prediction_type",
    }

    kind: Literal["ddpm"] = "ddpm"
    """Denoising diffusion in discrete timesteps."""
    beta_schedule: Literal["squaredcos_cap_v2", "linear", "scaled_linear"] = "squaredcos_cap_v2"
    """diffusers' name of the noise schedule; squaredcos_cap_v2 is the paper's cosine schedule."""
    num_train_timesteps: int = Field(1000, gt=0, le=1_000_000)
    """Timesteps T of the noise process in training."""
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    """The model's target: epsilon, the noise (the paper); v_prediction, the velocity (arXiv 2202.00512)."""

    @model_validator(mode="after")
    def _keeps_signal(self) -> DDPMConfig:
        if self.beta_schedule != "squaredcos_cap_v2" and self.num_train_timesteps > 8000:
            raise ValueError(
                f"num_train_timesteps {self.num_train_timesteps} with beta_schedule {self.beta_schedule}: "
                "float32 holds no signal of the last timesteps; take at most 8000, or squaredcos_cap_v2"
            )
        return self

    def build(self) -> DDPM:
        """The process that these values describe."""
        return DDPM(self)


class DDPM:
    """x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise, with a_t diffusers' alphas_cumprod at index t T."""

    samplers = SAMPLERS

    def __init__(self, config: DDPMConfig):
        self.config = config

    def sample_t(self, generator: np.random.Generator, max_t: float) -> float:
        """index / T, with the index uniform over the timesteps below max_t, at least the first."""
        num_steps = self.config.num_train_timesteps
        return int(generator.integers(max(1, round(max_t * num_steps)))) / num_steps

    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Noised latents [..., C, H, W] at times [...]."""
        signal, sigma = self._at(t)
        return signal * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The noise, or the velocity v = sqrt(a_t) noise - sqrt(1 - a_t) x_0."""
        if self.config.prediction_type == "epsilon":
            return noise
        signal, sigma = self._at(t)
        return signal * noise - sigma * latents

    def loss_weight(self, t: Tensor) -> Tensor | None:
        """None: every timestep counts alike (the simple loss of arXiv 2006.11239)."""
        return None

    def timesteps(self, t: Tensor) -> Tensor:
        """The indices t T, int64: exact, because float32 keeps each index / T apart from the next."""
        return (t * self.config.num_train_timesteps).round().long()

    def clean(self, prediction: Tensor, noised: Tensor, t: Tensor) -> Tensor:
        """The x_0 that a prediction at noised latents [..., C, H, W] and times [...] means."""
        signal, sigma = self._at(t.to(noised.device))
        if self.config.prediction_type == "epsilon":
            return (noised - sigma * prediction) / signal
        return signal * noised - sigma * prediction

    def sampler(self, sampling: SamplingConfig) -> Sampler:
        """A scheduler over a process of n timesteps: those of training from T - 1 on, T / n apart.

        That is trailing spacing (arXiv 2305.08891). Given n timesteps of n, every scheduler ends each step
        where the next begins, and the last at data; given n of T, diffusers' own spacings do not for counts
        that do not divide T, or sample a timestep -1.
        """
        import torch

        if reason := self.unsupported_reason(sampling):
            raise UserError(reason)
        steps, num_train = sampling.num_inference_steps, self.config.num_train_timesteps
        levels = [round(num_train * (i + 1) / steps) - 1 for i in range(steps)]
        alphas = scheduler(self.config).alphas_cumprod
        options = SAMPLERS[sampling.sampler or "ddim"]
        made = make_scheduler(
            options,
            num_train_timesteps=steps,
            prediction_type=self.config.prediction_type,
            timestep_spacing="trailing",
        )
        made.alphas_cumprod = alphas[levels]
        if "timesteps" in inspect.signature(made.set_timesteps).parameters:
            made.set_timesteps(timesteps=list(range(steps))[::-1])
        else:
            made.set_timesteps(steps)
        end_at_data(made)
        if options.get("float64_sigmas"):  # differences of squares of unlike size
            made.sigmas = made.sigmas.double()
        timesteps = torch.tensor(levels)[made.timesteps.long()]
        return Sampler(made, timesteps, timesteps / num_train)

    def unsupported_reason(self, sampling: SamplingConfig) -> str | None:
        """Samplers of a flow are unsupported; nor can one take more steps than there are timesteps."""
        steps, num_train = sampling.num_inference_steps, self.config.num_train_timesteps
        if (reason := unsupported_sampler(sampling.sampler, SAMPLERS, "ddpm")) or steps <= num_train:
            return reason
        return (
            f"sampling.num_inference_steps {steps} exceeds the {num_train} timesteps of training "
            "(objective.noise_process.num_train_timesteps); lower it"
        )

    def _at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        signal, sigma = _coefficients(self.config, t.device)
        index = self.timesteps(t)
        return signal[index][..., None, None, None], sigma[index][..., None, None, None]


def scheduler(config: DDPMConfig) -> DDPMScheduler:
    """The diffusers scheduler of a config; samplers are made from its config."""
    from diffusers import DDPMScheduler

    return DDPMScheduler(
        num_train_timesteps=config.num_train_timesteps,
        beta_schedule=config.beta_schedule,
        prediction_type=config.prediction_type,
        clip_sample=False,
    )


@cache
def _coefficients(config: DDPMConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """sqrt(a_t) and sqrt(1 - a_t), float32 [T], on the device that a step indexes them on."""
    alphas = scheduler(config).alphas_cumprod
    return alphas.sqrt().float().to(device), (1 - alphas).sqrt().float().to(device)
