"""How an image is denoised: diffusers' samplers, steps, guidance."""

from typing import Literal

from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from pydantic import Field

from megafusion.config import Config
from megafusion.errors import UserError
from megafusion.objective.noise_process import ScheduleConfig


class SamplingConfig(Config):
    """Sampler of the image path; text is decoded greedily."""

    sampler: Literal["ddim", "dpm++"] = "ddim"
    """DDIM (arXiv 2010.02502), or DPM-Solver++ of second order (arXiv 2211.01095)."""
    num_steps: int = Field(250, gt=0)
    """Denoising steps; DPM-Solver++ needs about a tenth of DDIM's."""
    guidance: float = Field(3.0, ge=0)
    """Classifier-free guidance: 1 is none; see `guided`."""
    max_new_tokens: int = Field(128, ge=0)
    """Longest text written before giving up on an end."""


def make_sampler(
    sampling: SamplingConfig, schedule: ScheduleConfig
) -> DDIMScheduler | DPMSolverMultistepScheduler:
    """A diffusers sampler of the run's noise schedule, its timesteps set. UserError for too many."""
    if sampling.num_steps > schedule.num_steps:
        raise UserError(
            f"sampling.num_steps {sampling.num_steps} is more than the {schedule.num_steps} timesteps that "
            "the model was trained on; lower it"
        )
    config = schedule.scheduler().config
    if sampling.sampler == "ddim":
        sampler = DDIMScheduler.from_config(config, set_alpha_to_one=True, timestep_spacing="trailing")
    else:
        sampler = DPMSolverMultistepScheduler.from_config(
            config, timestep_spacing="trailing", lower_order_final=True, final_sigmas_type="zero"
        )
    sampler.set_timesteps(sampling.num_steps)
    return sampler


def guided(conditional, unconditional, guidance: float):
    """unconditional + guidance x (conditional - unconditional) (Ho and Salimans, arXiv 2207.12598)."""
    return unconditional + guidance * (conditional - unconditional)
