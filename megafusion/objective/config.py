"""The noise process, the weights of the losses, and how images are sampled. Imports no torch."""

from typing import Literal

from pydantic import Field

from megafusion.config import Config


class ScheduleConfig(Config):
    """How images are noised, and what the model predicts about them."""

    beta_schedule: Literal["squaredcos_cap_v2", "linear", "scaled_linear"] = "squaredcos_cap_v2"
    """diffusers' name of the schedule; squaredcos_cap_v2 is the cosine schedule of the paper."""
    num_steps: int = Field(1000, gt=0)
    """Timesteps of the noise process in training."""
    prediction: Literal["epsilon", "v_prediction"] = "epsilon"
    """What is predicted: the noise (the paper), or the velocity (Salimans and Ho, arXiv 2202.00512)."""


class ObjectiveConfig(Config):
    """total = text + image_weight x image."""

    image_weight: float = Field(5.0, ge=0)
    """The paper's lambda: the weight of the mean diffusion loss an image beside the mean loss a token."""
    schedule: ScheduleConfig = ScheduleConfig()
    """The noise process."""


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
