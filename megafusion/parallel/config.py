"""How a run is laid over devices."""

from typing import Literal

from pydantic import Field, model_validator

from megafusion.config import Config

Recompute = Literal["none", "selective", "full"]


class ParallelConfig(Config):
    """Degrees of parallelism; what is left of the world is data parallel. None of it changes a run."""

    pipeline: int = Field(1, gt=0)
    """Stages that the layers are cut into; micro-batches pass through them one forward, one backward."""
    tensor: int = Field(1, gt=0)
    """Ranks that share every matrix (Megatron): heads, hidden units and vocabulary are divided by it."""
    sequence: bool = False
    """Whether norms and residuals of a tensor group hold a slice of the positions each (Megatron)."""
    ulysses: int = Field(1, gt=0)
    """Ranks that share a row's positions, and exchange them for heads in attention (DeepSpeed Ulysses)."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """ZeRO: what data ranks share - 0 nothing, 1 optimizer states, 2 gradients too, 3 weights too."""
    offload_optimizer: bool = False
    """Whether masters and moments are kept, and updated, in host memory (ZeRO 1 to 3)."""

    @model_validator(mode="after")
    def _possible(self) -> "ParallelConfig":
        if self.sequence and self.tensor == 1:
            raise ValueError(
                "sequence is a form of tensor parallelism: set tensor to 2 or more, or sequence to false"
            )
        if self.pipeline > 1 and self.zero_stage > 1:
            raise ValueError(
                f"zero_stage {self.zero_stage} cannot be had with pipeline {self.pipeline}: gradients and "
                "weights stay whole while micro-batches pass; use 0 or 1"
            )
        if self.offload_optimizer and (self.zero_stage == 0 or self.pipeline > 1):
            raise ValueError("offload_optimizer needs zero_stage 1, 2 or 3 and pipeline 1")
        return self
