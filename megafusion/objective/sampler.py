"""How an image is denoised: diffusers' samplers, steps, guidance."""

from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from megafusion.errors import UserError
from megafusion.objective.config import SamplingConfig, ScheduleConfig
from megafusion.objective.noise_process import ddpm_scheduler


def make_sampler(
    sampling: SamplingConfig, schedule: ScheduleConfig
) -> DDIMScheduler | DPMSolverMultistepScheduler:
    """A diffusers sampler of the run's noise schedule, its timesteps set. UserError for too many."""
    if sampling.num_steps > schedule.num_steps:
        raise UserError(
            f"sampling.num_steps {sampling.num_steps} is more than the {schedule.num_steps} timesteps that "
            "the model was trained on; lower it"
        )
    config = ddpm_scheduler(schedule).config
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
