"""The noise process, the weights of the losses, and how images are sampled. Imports no torch."""

from typing import ClassVar, Literal

from pydantic import Field

from megafusion.config import Config
from megafusion.objective.noise_process import DDPMConfig, NoiseProcessConfig


class ObjectiveConfig(Config):
    """total = text + image_weight x image."""

    renamed_keys: ClassVar[dict[str, str]] = {"schedule": "noise_process"}

    image_weight: float = Field(5.0, ge=0)
    """The paper's lambda: weight of the mean diffusion loss per image beside the mean loss per token."""
    noise_process: NoiseProcessConfig = DDPMConfig()
    """How images are noised, and the model's target."""


class SamplingConfig(Config):
    """Sampler of images; text is decoded greedily."""

    renamed_keys: ClassVar[dict[str, str]] = {
        "guidance": "guidance_scale",
        "num_steps": "num_inference_steps",
    }

    sampler: Literal["ddim", "dpm++", "euler", "heun"] | None = None
    """For the ddpm process: ddim (arXiv 2010.02502, the default) or dpm++, second-order DPM-Solver++ (arXiv
    2211.01095). For the flow process: euler (the default) or heun, which calls the model twice a step."""
    num_inference_steps: int = Field(250, gt=0, le=1_000_000)
    """Denoising steps; dpm++, euler and heun need about a tenth of ddim's."""
    guidance_scale: float = Field(3.0, ge=0)
    """Classifier-free guidance (arXiv 2207.12598); 1 turns it off."""
    max_new_tokens: int = Field(128, ge=0, le=1_000_000)
    """Maximum text tokens in an answer."""
