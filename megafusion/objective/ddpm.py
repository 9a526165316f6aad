"""Denoising diffusion in discrete timesteps (Ho et al., arXiv 2006.11239), by diffusers' schedulers.

Imports neither torch nor diffusers: configurations, and processes that only sample t, start without them.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from megafusion.config import Config
from megafusion.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from diffusers import DDPMScheduler
    from torch import Tensor

    from megafusion.objective.config import SamplingConfig
    from megafusion.objective.sampler import Sampler


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

    def sampler(self, sampling: SamplingConfig) -> Sampler:
        """DDIM is DPM-Solver++ of order 1 (arXiv 2211.01095), so one scheduler runs both.

        Its steps end where the next begins. DDIMScheduler's do so only for counts that divide T; and for some
        counts diffusers' own spacing has a timestep too many, -1.
        """
        from diffusers import DPMSolverMultistepScheduler

        if reason := self.unsupported_reason(sampling):
            raise UserError(reason)
        sampler = DPMSolverMultistepScheduler.from_config(
            scheduler(self.config).config,
            solver_order=2 if sampling.sampler == "dpm++" else 1,
            final_sigmas_type="zero",
        )
        steps, num_train = sampling.num_inference_steps, self.config.num_train_timesteps
        # Trailing spacing (arXiv 2305.08891): from T - 1, T / n apart.
        sampler.set_timesteps(timesteps=[round(num_train * (steps - i) / steps) - 1 for i in range(steps)])
        return sampler

    def unsupported_reason(self, sampling: SamplingConfig) -> str | None:
        """Samplers of a flow are unsupported; nor can one take more steps than there are timesteps."""
        if sampling.sampler not in (None, "ddim", "dpm++"):
            return (
                f"sampling.sampler {sampling.sampler} does not sample objective.noise_process.kind ddpm; use "
                "ddim or dpm++"
            )
        steps, num_train = sampling.num_inference_steps, self.config.num_train_timesteps
        if steps <= num_train:
            return None
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
