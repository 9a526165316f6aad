"""Degrees of parallelism."""

from typing import Literal

from pydantic import Field, model_validator

from megafusion.config import Config

Recompute = Literal["none", "selective", "full"]


class ParallelConfig(Config):
    """Degrees of parallelism; the rest of the world is data parallel. No degree changes a run's numbers."""

    pipeline: int = Field(1, gt=0)
    """Pipeline stages; micro-batches pass through them one forward, one backward (1F1B)."""
    virtual_stages: int = Field(1, gt=0)
    """Virtual stages of each pipeline stage (interleaved 1F1B, Megatron's virtual pipeline), which divide the
    time that stages wait for each other. A step's micro-batches must be a multiple of pipeline."""
    tensor: int = Field(1, gt=0)
    """Tensor-parallel ranks (Megatron), over which heads, hidden units and vocabulary are sharded."""
    sequence: bool = False
    """Megatron's sequence parallelism: norms and residuals are sharded by positions over the tensor ranks."""
    async_tensor: bool = False
    """Whether `train.compile` divides the collectives of `sequence`; the parts run beside matrix products."""
    ulysses: int = Field(1, gt=0)
    """Ranks over which positions are sharded, and exchanged for heads in attention (DeepSpeed Ulysses)."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """ZeRO stage. Data ranks shard: 0 nothing, 1 optimizer state, 2 gradients too, 3 weights too."""
    offload_optimizer: bool = False
    """Whether master weights and moments are kept and updated in host memory (ZeRO 1 to 3)."""

    @model_validator(mode="after")
    def _possible(self) -> "ParallelConfig":
        if self.sequence and self.tensor == 1:
            raise ValueError(
                "sequence is a form of tensor parallelism: set tensor to 2 or more, or sequence to false"
            )
        if self.async_tensor and not self.sequence:
            raise ValueError(
                "async_tensor overlaps the collectives of sequence parallelism; set sequence to true, or "
                "async_tensor to false"
            )
        if self.pipeline > 1 and self.zero_stage > 1:
            raise ValueError(
                f"zero_stage {self.zero_stage} does not work with pipeline {self.pipeline}: gradients and "
                "weights must stay whole between micro-batches; use 0 or 1"
            )
        if self.virtual_stages > 1 and self.pipeline == 1:
            raise ValueError(
                f"virtual_stages {self.virtual_stages} interleaves pipeline stages: set pipeline to 2 or "
                "more, or virtual_stages to 1"
            )
        if self.offload_optimizer and (self.zero_stage == 0 or self.pipeline > 1):
            raise ValueError("offload_optimizer needs zero_stage 1, 2 or 3 and pipeline 1")
        return self
