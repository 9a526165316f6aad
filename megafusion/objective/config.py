"""The noise process, the weights of the losses, and how images are sampled. Imports no torch."""

import difflib
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field, field_validator, model_validator

from megafusion.config import Config
from megafusion.objective import ddpm, flow
from megafusion.objective.noise_process import DDPMConfig, NoiseProcessConfig
from megafusion.objective.sampler import LEFT_OUT

LOGITS_BYTES = 2**27
"""Of the logits that are there at once: 2,048 positions of 32,000 tokens in bf16, 1,024 in float32."""
LOGITS_ALIGNMENT = 128
"""The columns of a product of logits, and the positions of a chunk, are a multiple of this."""


def positions_in_chunk(num_columns: int, bytes_per_logit: int) -> int:
    """Positions whose logits are computed at once."""
    padded = -(-num_columns // LOGITS_ALIGNMENT) * LOGITS_ALIGNMENT
    return max(1, LOGITS_BYTES // (padded * bytes_per_logit * LOGITS_ALIGNMENT)) * LOGITS_ALIGNMENT


Fraction = Annotated[float, Field(ge=0, le=1)]


class AlignmentConfig(Config):
    """Alignment of hidden states of images with a frozen vision model's features (REPA, arXiv 2410.06940)."""

    model: Path
    """Folder of a vision model of transformers, such as DINOv2, where objective.alignment is given. It sees
    the images' pixels, so sources must keep these (image_storage: pixels)."""
    feature_size: int = Field(gt=0)
    """Size of its features: hidden_size of its config.json."""
    layer: int = Field(gt=0)
    """The block, counted from 1, whose outputs are aligned; REPA takes one in the first third."""
    weight: float = Field(0.5, gt=0)
    """Weight of 1 - cosine similarity, averaged over the patches of an image and over images, in the loss."""


class ObjectiveConfig(Config):
    """total = text + image_weight x image, and alignment.weight x alignment where there is one."""

    renamed_keys: ClassVar[dict[str, str]] = {"schedule": "noise_process"}

    image_weight: float = Field(5.0, ge=0)
    """The paper's lambda: weight of the mean diffusion loss per image beside the mean loss per token."""
    z_loss: float = Field(0.0, ge=0)
    """Weight of the mean squared log of the softmax's denominator of next tokens, added to the text loss of a
    step: keeps logits small (1e-5 in Chameleon). Not in the losses of data.validation."""
    alignment: AlignmentConfig | None = None
    noise_process: NoiseProcessConfig = DDPMConfig()
    """How images are noised, and the model's target."""


class SamplingConfig(Config):
    """How images and text are sampled."""

    renamed_keys: ClassVar[dict[str, str]] = {
        "guidance": "guidance_scale",
        "num_steps": "num_inference_steps",
    }

    sampler: str | None = None
    """Sampler of images: a diffusers scheduler by its class's name (EulerDiscrete, UniPCMultistep, ...; all
    are in docs/python-api.md), or ddim (arXiv 2010.02502, the default of kind ddpm), dpm++ (second-order
    DPM-Solver++, arXiv 2211.01095), euler (the default of kind flow) or heun (of kind flow)."""
    num_inference_steps: int = Field(250, gt=0, le=1_000_000)
    """Denoising steps; solvers of higher order need about a tenth of ddim's."""
    guidance_scale: float = Field(3.0, ge=0, le=1000)
    """Classifier-free guidance (arXiv 2207.12598); 1 turns it off."""
    image_guidance_scale: float | None = Field(None, ge=0, le=1000)
    """Guidance on the images before an image, for edits; guidance_scale is then on the texts alone, as
    BAGEL's two scales (arXiv 2505.14683). By default guidance_scale is on both."""
    guidance_interval: tuple[Fraction, Fraction] = Field((0.0, 1.0), strict=False)
    """First and last t (0 is data, 1 is noise) with guidance (arXiv 2404.07724)."""
    guidance_rescale: float = Field(0.0, ge=0, le=1)
    """How far guidance keeps the deviation of the conditional prediction (arXiv 2305.08891)."""
    negative_prompt: str = ""
    """Text that guidance leads away from, in place of no text."""
    image_temperature: float = Field(1.0, ge=0, le=100)
    """Divides the logits of an image's codes, in models with a codebook; 0 is greedy. There, guidance is on
    these logits, and the keys above that are of samplers have no effect."""
    image_top_p: float = Field(1.0, gt=0, le=1)
    """Sample codes from the most probable ones whose probabilities add up to p."""
    max_new_tokens: int = Field(128, ge=0, le=1_000_000)
    """Maximum text tokens in an answer."""
    temperature: float = Field(0.0, ge=0, le=100)
    """Divides the logits of text tokens; 0 is greedy decoding, else at least 0.01."""
    top_k: int = Field(0, ge=0)
    """Sample from the k most probable tokens; 0 for all."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Sample from the most probable tokens whose probabilities add up to p (arXiv 1904.09751)."""
    min_p: float = Field(0.0, ge=0, le=1)
    """Sample from tokens at least p times as probable as the most probable (arXiv 2407.01082)."""
    repetition_penalty: float = Field(1.0, gt=0, le=100)
    """Divides positive logits of tokens of the prompt and the answer so far, and multiplies negative ones
    (arXiv 1909.05858)."""
    stop: tuple[str, ...] = Field((), strict=False)
    """Texts that end an answer, which does not include them."""

    @field_validator("sampler")
    @classmethod
    def _named(cls, name: str | None) -> str | None:
        if name is None:
            return None
        kinds = {"ddpm": ddpm.SAMPLERS, "flow": flow.SAMPLERS}
        short = name.removesuffix("Scheduler")
        kind_of = {each: kind for kind, samplers in reversed(kinds.items()) for each in samplers}
        if short in kind_of:
            return short
        by_lower = {each.lower(): each for each in kind_of}
        if short in LEFT_OUT:
            reason = "draws worse or is for other models (docs/python-api.md)"
        elif near := difflib.get_close_matches(short.lower(), by_lower, 1, 0.5):
            found = by_lower[near[0]]
            reason = f"is unknown; did you mean {found!r} (kind {kind_of[found]})?"
        else:
            reason = "is unknown"
        listed = " and ".join(f"{', '.join(samplers)} (kind {kind})" for kind, samplers in kinds.items())
        raise ValueError(f"{name} {reason}{'' if reason[-1] == '?' else '.'} The samplers are {listed}")

    @model_validator(mode="after")
    def _consistent(self) -> "SamplingConfig":
        first, last = self.guidance_interval
        if first > last:
            raise ValueError(f"guidance_interval {first} to {last}: the first must not exceed the last")
        for key in ("temperature", "image_temperature"):
            if 0 < (value := getattr(self, key)) < 0.01:
                raise ValueError(f"{key} {value} must be 0 (greedy) or from 0.01 to 100")
        if not all(self.stop):
            raise ValueError("stop has an empty text, which would end every answer; leave it out")
        return self
