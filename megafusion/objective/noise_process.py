"""The forward noise process, from diffusers' schedulers."""

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from megafusion.objective.config import ScheduleConfig


def ddpm_scheduler(config: ScheduleConfig) -> DDPMScheduler:
    """The diffusers scheduler of a noise process; samplers are made from its config."""
    return DDPMScheduler(
        num_train_timesteps=config.num_steps,
        beta_schedule=config.beta_schedule,
        prediction_type=config.prediction,
        clip_sample=False,
    )


class NoiseSchedule(nn.Module):
    """x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise, with a_t diffusers' alphas_cumprod.

    A table on the model's device, so that a step does no lookup on the host.
    """

    def __init__(self, config: ScheduleConfig):
        super().__init__()
        self.prediction = config.prediction
        with torch.device("cpu"):  # also where a model is first made without storage
            alphas = ddpm_scheduler(config).alphas_cumprod
        self.register_buffer("signal", alphas.sqrt().float(), persistent=False)
        self.register_buffer("sigma", (1 - alphas).sqrt().float(), persistent=False)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noised latents [..., C, H, W] at integer timesteps [...]."""
        signal, sigma = self._at(timesteps)
        return signal * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the model is to predict: the noise, or v = sqrt(a_t) noise - sqrt(1 - a_t) x_0."""
        if self.prediction == "epsilon":
            return noise
        signal, sigma = self._at(timesteps)
        return signal * noise - sigma * latents

    def _at(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        return self.signal[timesteps][..., None, None, None], self.sigma[timesteps][..., None, None, None]
