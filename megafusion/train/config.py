"""One file describes a run."""

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from megafusion.config import Config
from megafusion.data.config import DataConfig
from megafusion.engine.config import OptimizerConfig
from megafusion.model.config import ModelConfig
from megafusion.objective.config import ObjectiveConfig, SamplingConfig
from megafusion.parallel.config import ParallelConfig, Recompute
from megafusion.resilience.config import ResilienceConfig
from megafusion.telemetry.config import TelemetryConfig

if TYPE_CHECKING:
    from megafusion.sequence.packing import SequenceShape


class SamplesConfig(Config):
    """Pictures drawn and captions written while training, to look at."""

    every: int = Field(0, ge=0)
    """Steps between two sample sheets, a multiple of train.checkpoint_every; 0 for none."""
    num_pairs: int = Field(8, gt=0)
    """Pairs of the first pair source whose caption is drawn and whose picture is described."""


class TrainConfig(Config):
    """How long and how often."""

    renamed_keys: ClassVar[dict[str, str]] = {
        "global_batch_rows": "global_batch_size",
        "micro_batch_rows": "micro_batch_size",
        "log_every": ".telemetry.log_every",
        "trackers": ".telemetry.trackers",
        "wandb_project": ".telemetry.wandb_project",
        "timeout_seconds": ".resilience.timeout_seconds",
    }

    num_steps: int = Field(gt=0)
    """Optimizer steps."""
    global_batch_size: int = Field(gt=0)
    """Packed rows of an optimizer step, over all ranks."""
    micro_batch_size: int = Field(gt=0)
    """Packed rows that a rank computes at a time; the rest is gradient accumulation."""
    precision: Literal["fp32", "bf16", "fp8"] = "fp32"
    """fp32; bf16 with float32 masters, moments and gradient sums; fp8, which is bf16 with 8-bit matrix
    products in the blocks by transformer-engine (Hopper or later)."""
    recompute: Recompute = "none"
    """Activation checkpointing: what a block's backward pass computes again - none; selective, attention and
    cheap operations; full, everything."""
    compile: bool = False
    """Whether torch.compile fuses the blocks' operations."""
    ema_decay: float = Field(0.9999, ge=0, lt=1)
    """Decay of the averaged weights, reached as (1 + step) / (10 + step) rises to it."""
    checkpoint_every: int = Field(1000, gt=0)
    """Steps between two checkpoints; one is always made at the end."""
    keep_last: int = Field(2, gt=0)
    """Checkpoints kept; older ones are deleted once a newer one is complete."""
    on_save_error: Literal["stop", "continue"] = "stop"
    """When a checkpoint cannot be written: stop, or continue, which counts it, and leaves a checkpoint out
    rather than wait for a slow disk. The last checkpoint of a run is waited for in either case."""
    keep_every: int = Field(0, ge=0)
    """Steps whose multiples have checkpoints that are never deleted; 0 for none."""


class RunConfig(Config):
    """Everything that decides a run's numbers, and where it is kept."""

    renamed_keys: ClassVar[dict[str, str]] = {"health": "resilience"}

    out: Path
    """Run folder: frozen configuration, metrics, checkpoints, samples."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the initial weights and of the data order."""
    data: DataConfig
    model: ModelConfig
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig
    parallel: ParallelConfig = ParallelConfig()
    sampling: SamplingConfig = SamplingConfig()
    samples: SamplesConfig = SamplesConfig()
    resilience: ResilienceConfig = ResilienceConfig()
    telemetry: TelemetryConfig = TelemetryConfig()

    @model_validator(mode="after")
    def _consistent(self) -> "RunConfig":
        if self.train.precision != "fp32" and self.parallel.zero_stage == 0:
            raise ValueError(
                f"train.precision {self.train.precision} needs float32 masters, which parallel.zero_stage 0 "
                "has not; use 1"
            )
        positions = max(self.model.patches) + 4  # bos, boi, eoi, eos
        if positions > self.data.sequence_length:
            raise ValueError(
                f"an image takes {positions} positions, more than data.sequence_length "
                f"{self.data.sequence_length}; raise it or model.patch_size"
            )
        if reason := self.objective.noise_process.build().refusal(self.sampling):
            raise ValueError(reason)
        if self.samples.every % self.train.checkpoint_every:
            raise ValueError(
                f"samples.every {self.samples.every} is not a multiple of train.checkpoint_every "
                f"{self.train.checkpoint_every}: sheets are drawn from checkpoints"
            )
        return self

    @property
    def sequence_shape(self) -> "SequenceShape":
        """The shape of a packed row that data and model agree on."""
        from megafusion.sequence.packing import SequenceShape

        data, model = self.data, self.model
        return SequenceShape(
            data.sequence_length,
            data.images_per_row,
            model.patches,
            model.latent_channels,
            model.latent_sizes,
        )
