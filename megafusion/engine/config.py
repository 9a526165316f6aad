"""The optimizer's configuration. Imports no torch."""

from typing import Annotated

from pydantic import Field

from megafusion.config import Config

Decay = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Config):
    """AdamW (arXiv 1711.05101) with warm-up and cosine decay."""

    learning_rate: float = Field(3e-4, gt=0)
    """Peak, reached after the warm-up."""
    final_learning_rate: float = Field(1.5e-5, ge=0)
    """Where the cosine ends, at the last step."""
    num_warmup_steps: int = Field(4000, ge=0)
    """Steps of linear warm-up."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """Decay of the two moments."""
    epsilon: float = Field(1e-8, gt=0)
    """Added to the root of the second moment."""
    weight_decay: float = Field(0.1, ge=0)
    """For matrices; biases, norms and other vectors have none."""
    gradient_clip: float = Field(1.0, ge=0)
    """Largest global gradient norm; 0 for no clipping."""
